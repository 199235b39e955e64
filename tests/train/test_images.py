import io

import numpy as np
import pytest
from PIL import Image

from doratune.train.gather import BadRow
from doratune.train.images import Picture


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def opened(source):
    return np.asarray(Picture("x", source, "a").open())


@pytest.mark.parametrize("as_path", [False, True])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_photographs_stand_upright(tmp_path, kind, as_path):
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 8, 8))  # white on the left, which the camera says is the top
    exif = image.getexif()
    exif[0x112] = 6
    source = saved(image, kind, exif=exif)
    if as_path:
        (tmp_path / "x").write_bytes(source)
        source = tmp_path / "x"
    pixels = opened(source)
    assert pixels.shape == (16, 8, 3)
    assert pixels[:4].min() > 200
    assert pixels[-4:].max() < 50


def test_broken_orientation_does_not_break_an_image():
    source = saved(Image.new("RGB", (4, 2)), "JPEG", exif=b"Exif\x00\x00no such data")
    assert opened(source).shape == (2, 4, 3)


def test_16_bits_of_gray_become_8():
    gray = np.array([[0, 257, 1000], [32768, 65000, 65535]], np.uint16)
    expected = [[0, 1, 4], [128, 253, 255]]
    files = [saved(Image.fromarray(gray), kind) for kind in ("PNG", "TIFF")]
    files += [saved(Image.fromarray(gray.astype(">u2")), "TIFF"), b"P5 3 2 65535\n" + gray.astype(">u2").tobytes()]
    for source in (*files, Image.fromarray(gray)):
        assert opened(source)[..., 0].tolist() == expected
    dark = b"P5 3 2 65535\n" + (gray // 257).astype(">u2").tobytes()
    assert opened(dark).max() == 1


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_values_without_a_known_white_are_refused(kind):
    gray = np.array([[0, 128, 255]], kind)
    assert opened(saved(Image.fromarray(gray), "TIFF"))[..., 0].tolist() == [[0, 128, 255]]
    for source in (gray * 4, gray - 1):
        with pytest.raises(BadRow, match=r"expected values from 0 to 255 or from 0 to 1, found"):
            opened(saved(Image.fromarray(source), "TIFF"))


def test_true_is_white():
    assert opened(np.array([[True, False]]))[..., 0].tolist() == [[255, 0]]

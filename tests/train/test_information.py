"""doratune.json that somebody else has written to."""

import json

import pytest

import doratune as dt
from doratune.train.information import Information


@pytest.mark.parametrize("wrong", [{"labels": None}, {"image_size": 224}, {"image_size": ["a", 1]}, {"image_size": []}])
def test_a_broken_file_is_named(tmp_path, wrong):
    about = {"task": "image-classification", "base": "vit", "method": "dora", **wrong}
    (tmp_path / "doratune.json").write_text(json.dumps(about))
    with pytest.raises(dt.AdapterError, match=r"doratune\.json cannot be read"):
        Information.load(tmp_path)

"""Random changes of training images, with PIL alone, and the same for a given seed, epoch and image."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from doratune.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

SMALLEST_AREA = 0.6
"""Of a crop, as a share of the image."""
RATIO = 4 / 3
"""Widest crop, relative to the image's own proportions."""
DEGREES = 15.0
COLOR = 0.3
"""Brightness, contrast and saturation change by up to this share."""


def augmented(image: Image, kinds: Collection[str], *key: int) -> Image:
    """A randomly changed copy.

    Args:
        image: in RGB.
        kinds: crop, flip, rotate, color.
        key: seed, epoch and number of the image: the same key gives the same copy, in whatever order images are read.
    """
    random = np.random.default_rng(key)
    pil = require("PIL.Image")
    if "rotate" in kinds:
        image = image.rotate(random.uniform(-DEGREES, DEGREES), pil.Resampling.BILINEAR)
    if "crop" in kinds:
        image = _crop(image, random)
    if "flip" in kinds and random.random() < 0.5:
        image = image.transpose(pil.Transpose.FLIP_LEFT_RIGHT)
    if "color" in kinds:
        enhance = require("PIL.ImageEnhance")
        for change in (enhance.Brightness, enhance.Contrast, enhance.Color):
            image = change(image).enhance(random.uniform(1 - COLOR, 1 + COLOR))
    return image


def _crop(image: Image, random: np.random.Generator) -> Image:
    """A part of the image, at its full size again."""
    area = random.uniform(SMALLEST_AREA, 1)
    stretch = math.exp(random.uniform(-math.log(RATIO), math.log(RATIO)) / 2)
    width = min(1.0, math.sqrt(area) * stretch) * image.width
    height = min(1.0, math.sqrt(area) / stretch) * image.height
    left, top = random.uniform(0, image.width - width), random.uniform(0, image.height - height)
    box = (left, top, left + width, top + height)
    return image.resize(image.size, require("PIL.Image").Resampling.BICUBIC, box=box)

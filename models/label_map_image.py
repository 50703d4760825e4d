"""Pictures of maps, shared by report, client and playground: colours of up to 255 classes, an activation map over its image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.preprocess import decode, resize

RED, OPACITY = (220, 20, 20), 160  # colour of the largest value of an activation map, and its opacity of 255


def palette() -> list[int]:
    """256 colours as a flat list of red, green and blue, 0..255.

    The bits of the class number, from the lowest, are dealt to the highest bits of red, green and blue in turn, as in
    PASCAL VOC's palette (Everingham et al. 2010), shifted by one so that no class is black. 255, no class, is black.
    """
    colours: list[int] = []
    for index in range(256):
        bits, channels = (index + 1) % 256, [0, 0, 0]
        for shift in range(7, -1, -1):
            for channel in range(3):
                channels[channel] |= (bits >> channel & 1) << shift
            bits >>= 3
        colours += channels
    return colours


def activation_overlay(
    image: bytes, values: NDArray[Any] | Sequence[Sequence[float]], crop: float, side: int
) -> Image.Image:
    """The part of an encoded image that the network sees, `side` pixels wide and high, under its activation map [h,w] in red.

    The map is scaled from its least to its largest value. crop: side of the centre crop, as a share of the image's shorter
    side. Raises ImageError as `models.preprocess.decode` does.
    """
    resize_to = round(side / crop)
    pixels = resize(decode(image, resize_to=resize_to).convert("RGB"), side, resize_to)
    square, heat = Image.fromarray(pixels.transpose(1, 2, 0)), np.asarray(values, dtype=np.float64)
    heat = (heat - heat.min()) / (np.ptp(heat) or 1.0)
    opacity = Image.fromarray((OPACITY * heat).astype(np.uint8)).resize((side, side), Image.Resampling.BILINEAR)
    square.paste(RED, (0, 0, side, side), opacity)
    return square

"""Encoded images to the network's size, quickly: libjpeg-turbo through torchvision, reduced while decoding, or nvJPEG.

`models.preprocess` is the reference, and what the server runs. Everything here is within one grey level of it, except on the
GPU, whose decoder rounds in its own way and always decodes at full size.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.preprocess import ORIENTATION, ROOM, UPRIGHT, centred, decoded, opened, preprocess, scaled_size
from pipeline.params import ImageParams


def exact(data: bytes, image: ImageParams) -> Tensor:
    """uint8 [3,size,size]: what the served classifier makes of the same bytes. Raises ImageError."""
    return torch.from_numpy(preprocess(data, image.size, image.resize_to))


def fast(data: bytes, image: ImageParams) -> Tensor:
    """uint8 [3,size,size], within a grey level of `exact`. Raises ImageError.

    Of a plain JPEG pixels come from libjpeg-turbo in one go; of one that `exact` decodes at a fraction of its size, and of
    everything else (PNG, WebP, CMYK), from Pillow. Resized by torch, on vectors.
    """
    with opened(data) as picture:
        large = min(picture.size) >= 2 * ROOM * image.resize_to
        if is_plain_jpeg(picture) and not large and _torchvision() is not None:
            pixels = _libjpeg(data)
        else:
            pixels = torch.from_numpy(np.array(decoded(picture, image.resize_to))).permute(2, 0, 1)
    return _cropped(pixels, image)


def is_plain_jpeg(picture: Image.Image) -> bool:
    """Whether an opened file is a JPEG of colours or grey that stands upright: what every JPEG decoder sees alike."""
    if picture.format != "JPEG" or picture.mode not in ("RGB", "L"):
        return False
    return "exif" not in picture.info or picture.getexif().get(ORIENTATION) not in UPRIGHT


def nvjpeg(encoded: list[bytes], image: ImageParams, device: torch.device) -> Tensor:
    """uint8 [B,3,size,size] on the device, of plain JPEGs: nvJPEG, then resized there. Raises RuntimeError for others."""
    io = _torchvision()
    if io is None:
        raise RuntimeError("this torchvision has no decoder of JPEGs")
    found = io.decode_jpeg([_bytes(data) for data in encoded], mode=io.ImageReadMode.RGB, device=device)
    return torch.stack([_cropped(pixels, image) for pixels in found])


def left_to_gpu(data: bytes, image: ImageParams) -> Tensor | None:
    """None where `nvjpeg` can take the file, by its header; else its pixels by `fast`. Raises ImageError."""
    with opened(data) as picture:
        if is_plain_jpeg(picture):
            return None
    return fast(data, image)


def _libjpeg(data: bytes) -> Tensor:
    # uint8 [3,H,W], of channels that lie together.
    io = _torchvision()
    return io.decode_jpeg(_bytes(data), mode=io.ImageReadMode.RGB)


@functools.cache
def _torchvision() -> Any:
    # Where it decodes JPEGs, which it says that it will drop: Pillow, a third slower, then takes its place. Imported when it
    # is first asked for, as it brings much along.
    io = importlib.import_module("torchvision.io")
    return io if hasattr(io, "decode_jpeg") else None


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _cropped(pixels: Tensor, image: ImageParams) -> Tensor:
    # As preprocess.resize: shorter side to resize_to, centre crop.
    height, width = pixels.shape[1:]
    if min(height, width) != image.resize_to:
        width, height = scaled_size(width, height, image.resize_to)
        kind = torch.float32 if pixels.is_cuda else torch.uint8  # CUDA's interpolation knows no uint8
        # A batch of one whose strides say that its channels lie together, which is quickest; pixels[None] would not say it.
        batch = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2).to(kind)
        pixels = F.interpolate(batch, size=(height, width), mode="bilinear", antialias=True)[0]
        pixels = pixels if kind == torch.uint8 else pixels.round().clamp(0, 255).to(torch.uint8)
    left, top = centred(width, height, image.size)
    return pixels[:, top : top + image.size, left : left + image.size]

"""Fast decoding of images to the network's size: libjpeg-turbo through torchvision, reduced while decoding, or nvJPEG.

Reference for the test view is `models.preprocess`, which the server runs; for a resized crop, torchvision's
RandomResizedCrop of the decoded file. Results here are within one grey level of the reference, with two exceptions:
nvJPEG rounds differently and always decodes at full size, and `decode_original` reduces images above its limit.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.preprocess import (
    ORIENTATION,
    ROOM,
    UPRIGHT,
    centred,
    decoded,
    opened,
    preprocess,
    scaled_size,
    to_rgb,
    upright,
)
from pipeline.augment.crops import RATIO
from pipeline.params import ImageParams


def decode_exact(data: bytes, image: ImageParams) -> Tensor:
    """Decode to uint8 [3,size,size], identical to the served classifier. Raises ImageError."""
    return torch.from_numpy(preprocess(data, image.size, image.resize_to, interpolation=image.interpolation))


def decode_fast(data: bytes, image: ImageParams) -> Tensor:
    """Decode to uint8 [3,size,size], within one grey level of `decode_exact`. Raises ImageError.

    A plain JPEG is decoded by libjpeg-turbo in one call. A JPEG that `decode_exact` decodes at a fraction of its size, and
    every other format (PNG, WebP, CMYK), is decoded by Pillow. torch resizes with vector instructions.
    """
    with opened(data) as picture:
        large = min(picture.size) >= 2 * ROOM * image.resize_to
        pixels = _decode_jpeg(data, picture) if not large else _to_tensor(decoded(picture, image.resize_to))
    return evaluation_view(pixels, image)


def enough_pixels(image: ImageParams, crop_scale: list[float]) -> float:
    """Number of pixels of an image from which no resized crop is enlarged: its smallest box has image.size rows and columns."""
    return image.size**2 * RATIO[1] / crop_scale[0]


def decode_original(data: bytes, max_pixels: float) -> Tensor:
    """Decode the whole image to uint8 [3,H,W], upright, with interleaved channels in memory. Raises ImageError.

    An image of more than `max_pixels` is reduced to `max_pixels`: by 2 or 4 while a JPEG is decoded, then by a Lanczos
    filter. A bilinear filter would remove a tenth of the gradients' energy from the crops
    (tests/pipeline/data/test_original_crops.py).
    """
    with opened(data) as picture:
        width, height = picture.size
        if width * height <= max_pixels:
            return _decode_jpeg(data, picture)
        shorter, longer = sorted((width, height))
        size = scaled_size(width, height, max(1, int((max_pixels * shorter / longer) ** 0.5)))
        drafted = picture.draft(None, size)
        box = drafted[1] if drafted else None
        return _to_tensor(upright(to_rgb(picture).resize(size, Image.Resampling.LANCZOS, box=box), picture))


def crop_and_resize(pixels: Tensor, box: list[int] | None, image: ImageParams, *, exactly: bool = False) -> Tensor:
    """Cut a box from an original on its device and resize it: uint8 [3,size,size].

    box: (top, left, height, width, flipped); None: the test view. exactly: use Pillow, bit-identical to torchvision's
    crop of a PIL image, instead of within one grey level of it.
    """
    if box is None:
        return evaluation_view(pixels, image)
    top, left, height, width, flipped = box
    box_pixels = pixels[:, top : top + height, left : left + width]
    if exactly:
        size = (image.size, image.size)
        box_pixels = _to_tensor(
            Image.fromarray(box_pixels.permute(1, 2, 0).numpy()).resize(size, Image.Resampling.BILINEAR)
        )
    else:
        box_pixels = _resized(box_pixels, image.size, image.size)
    return box_pixels.flip(2) if flipped else box_pixels


def is_plain_jpeg(picture: Image.Image) -> bool:
    """Whether an opened file is an upright RGB or grey JPEG, for which all JPEG decoders agree."""
    if picture.format != "JPEG" or picture.mode not in ("RGB", "L"):
        return False
    return "exif" not in picture.info or picture.getexif().get(ORIENTATION) not in UPRIGHT


def decode_nvjpeg(encoded: Iterable[bytes], device: torch.device) -> list[Tensor]:
    """Decode plain JPEGs with nvJPEG: uint8 [3,H,W] each, on the device. Raises RuntimeError for other files."""
    io = _jpeg_decoder()
    if io is None:
        raise RuntimeError("this torchvision has no decoder of JPEGs")
    return io.decode_jpeg([_bytes(data) for data in encoded], mode=io.ImageReadMode.RGB, device=device)


class DecodingStream:
    """A CUDA stream for batches that nvJPEG decodes; the CPU has none.

    torchvision's decoder writes into memory that was freed while queued kernels still read it, and does not wait for them
    (pytorch/vision 9606: most batches were corrupted). So its batches have a stream apart from the training steps, and
    that stream is empty when the decoder starts.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """The batch of `work`, for the current stream of the device."""
        if self._stream is None:
            return work()
        self._stream.synchronize()
        with torch.cuda.stream(self._stream):
            pixels = work()
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        pixels.record_stream(current)
        return pixels


def decode_unless_nvjpeg(data: bytes, image: ImageParams, max_pixels: float | None = None) -> Tensor | None:
    """None if nvJPEG can decode the file; else its pixels by `decode_fast` or `decode_original`. Raises ImageError."""
    with opened(data) as picture:
        if is_plain_jpeg(picture):
            return None
    return decode_fast(data, image) if max_pixels is None else decode_original(data, max_pixels)


def _decode_jpeg(data: bytes, picture: Image.Image) -> Tensor:
    # uint8 [3,H,W]: by libjpeg-turbo if the file is a plain JPEG, else by Pillow.
    io = _jpeg_decoder()
    if io is None or not is_plain_jpeg(picture):
        return _to_tensor(decoded(picture))
    return io.decode_jpeg(_bytes(data), mode=io.ImageReadMode.RGB)


def _to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _jpeg_decoder() -> Any:
    # torchvision.io, imported on first use because the import is heavy; None if it has no JPEG decoder (its removal is
    # announced). Pillow is then used, a third slower.
    io = importlib.import_module("torchvision.io")
    return io if hasattr(io, "decode_jpeg") else None


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def evaluation_view(pixels: Tensor, image: ImageParams) -> Tensor:
    """uint8 [3,H,W] → [3,size,size], like preprocess.resize: resize the shorter side to resize_to, crop the centre."""
    height, width = pixels.shape[1:]
    if min(height, width) != image.resize_to:
        width, height = scaled_size(width, height, image.resize_to)
        pixels = _resized(pixels, height, width, image.interpolation)
    left, top = centred(width, height, image.size)
    return pixels[:, top : top + image.size, left : left + image.size]


def _resized(pixels: Tensor, height: int, width: int, interpolation: str = "bilinear") -> Tensor:
    dtype = torch.float32 if pixels.is_cuda else torch.uint8  # CUDA's interpolation does not support uint8
    # A batch of one in channels-last strides, for which interpolation is fastest; pixels[None] would lose this layout.
    batch = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2).to(dtype)
    pixels = F.interpolate(batch, size=(height, width), mode=interpolation, antialias=True)[0]
    return pixels if dtype == torch.uint8 else pixels.round().clamp(0, 255).to(torch.uint8)

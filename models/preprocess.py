"""From an encoded image to the uint8 array that the network takes: the same bytes give the same array in training and serving.

Pillow and numpy alone, because the served classifier runs this same file where there is no torch.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 32 * 1024 * 1024
MAX_PIXELS = 50_000_000
MAX_ASPECT = 64
ORIENTATION = 0x0112  # the EXIF tag, and how to turn the picture upright for each of its values but 1
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """An image that cannot be used; the message says why in words fit for the caller (no path, no memory address)."""


def decode(data: bytes) -> Image.Image:
    """Decode JPEG, PNG or WebP bytes to an upright RGB image.

    The size is read from the header and bounded before any pixel is decoded. EXIF orientation is applied; grayscale,
    palette, CMYK and 16-bit images become 8-bit RGB (16-bit by its high byte). Raises ImageError otherwise.
    """
    if len(data) == 0:
        raise ImageError("is empty (0 bytes); expected a JPEG, PNG or WebP image")
    if len(data) > MAX_BYTES:
        raise ImageError(f"has {len(data)} bytes, above the limit of {MAX_BYTES}")
    try:
        # Image.open reads headers only. Its own bomb check is replaced by the tighter bound below, checked before load.
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(*image.size)
            image.load()
            return to_rgb(upright(image))
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError("is not a JPEG, PNG or WebP image") from None
    except Image.DecompressionBombError:
        raise ImageError(f"has more pixels than the limit of {MAX_PIXELS}") from None
    except Exception:
        # Pillow's parsers let out whatever they stumble over: OSError, SyntaxError, ValueError, TypeError, struct.error.
        raise ImageError("is damaged or truncated: its pixels cannot be decoded") from None


def check_size(width: int, height: int) -> None:
    """Refuse, by ImageError, an image whose header promises too many pixels or a shape that a resize would blow up."""
    if width * height > MAX_PIXELS:
        raise ImageError(f"has {width}x{height} = {width * height} pixels, above the limit of {MAX_PIXELS}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(f"is {width}x{height}, its longer side above {MAX_ASPECT} times its shorter side")


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation asks. The tag alone is read: other tags may be damaged, the pixels are not."""
    turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB. Pillow clips 16-bit grey at 255 when converting, so its high byte is taken here."""
    if image.mode.startswith("I"):
        wide = np.asarray(image, dtype=np.int64)
        return Image.fromarray((np.clip(wide, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def resize(image: Image.Image, size: int, resize_to: int) -> np.ndarray:
    """Shorter side to `resize_to` (antialiased bilinear), centre crop of `size`: uint8 [3, size, size], RGB.

    An image that already fits is not resampled, so 32x32 pictures pass through unchanged. Raises ImageError when the
    resized image would be smaller than the crop.
    """
    width, height = image.size
    if min(width, height) != resize_to:
        scale = resize_to / min(width, height)
        image = image.resize(
            (max(resize_to, round(width * scale)), max(resize_to, round(height * scale))), Image.Resampling.BILINEAR
        )
    if min(image.size) < size:
        raise ImageError(f"would be cropped to {size} pixels after a resize to {resize_to}; expected resize_to >= size")
    left, top = (image.size[0] - size) // 2, (image.size[1] - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(image.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1))


def preprocess(data: bytes, size: int, resize_to: int) -> np.ndarray:
    """Encoded bytes to uint8 [3, size, size]: `decode`, then `resize`. Raises ImageError."""
    return resize(decode(data), size, resize_to)

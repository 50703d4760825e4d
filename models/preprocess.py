"""From an encoded image to the uint8 array that the network takes: the same bytes give the same array in training and serving.

Pillow and numpy alone, because the served classifier runs this same file where there is no torch.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 32 * 1024 * 1024
MAX_PIXELS = 50_000_000
MAX_ASPECT = 64
# Encoders write about ten scans into a progressive JPEG. Each is a pass over all pixels and may take no more than ten
# bytes, so that without a bound half a megabyte is a minute's work, and the largest file an hour's.
MAX_SCANS = 100
MAX_SCANNED_PIXELS = 20 * MAX_PIXELS
# JPEG segments before the first scan, or PNG chunks: Pillow walks them in Python, and the largest file has room for
# millions of empty ones.
MAX_PARTS = 20_000
WEBP_HEADER = 30  # bytes
ORIENTATION = 0x0112  # the EXIF tag, and how to turn the picture upright for each of its values but 1
# A marker of a JPEG stream that has a segment, or its end: no stuffed byte, no restart, no fill byte.
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
START_OF_SCAN, END_OF_IMAGE = 0xDA, 0xD9
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
    """An image that cannot be used; the message says why in words fit for the caller (no path, no memory address).

    kind: the fault in one word: empty, bytes, format, pixels, shape, parts, scans or damaged.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def decode(data: bytes) -> Image.Image:
    """Decode JPEG, PNG or WebP bytes to an upright RGB image.

    The size is read from the header and bounded before any pixel is decoded. EXIF orientation is applied; grayscale,
    palette, CMYK and 16-bit images become 8-bit RGB (16-bit by its high byte). Of an animation the first frame is taken.
    Raises ImageError otherwise.
    """
    with opened(data) as image:
        image.load()
        return to_rgb(upright(image))


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """JPEG, PNG or WebP bytes of which the headers are read and bounded, and no pixel yet. Closed when the block ends.

    Raises ImageError for what is refused, and in the place of whatever a decoder raises within the block.
    """
    if len(data) == 0:
        raise ImageError("empty", "is empty (0 bytes); expected a JPEG, PNG or WebP image")
    if len(data) > MAX_BYTES:
        raise ImageError("bytes", f"has {len(data)} bytes, above the limit of {MAX_BYTES}")
    check_webp_canvas(data)
    check_parts(data)
    try:
        # Image.open reads headers only. Its own bomb check is replaced by the tighter bound below, checked before load.
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(*image.size)
            if image.format in ("JPEG", "MPO"):
                check_scans(data, image.width * image.height)
            yield image
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError("format", "is not a JPEG, PNG or WebP image") from None
    except Image.DecompressionBombError:
        raise ImageError("pixels", f"has more pixels than the limit of {MAX_PIXELS}") from None
    except Exception:
        # Pillow's parsers let out whatever they stumble over: OSError, SyntaxError, ValueError, TypeError, struct.error.
        raise ImageError("damaged", "is damaged or truncated: its pixels cannot be decoded") from None


def check_size(width: int, height: int) -> None:
    """Refuse, by ImageError, an image whose header promises too many pixels or a shape that a resize would blow up."""
    if width * height > MAX_PIXELS:
        raise ImageError("pixels", f"has {width}x{height} = {width * height} pixels, above the limit of {MAX_PIXELS}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError("shape", f"is {width}x{height}, its longer side above {MAX_ASPECT} times its shorter side")


def check_webp_canvas(data: bytes) -> None:
    """Refuse, by ImageError, a WebP whose header promises too much: its decoder takes memory for the whole canvas at once."""
    header = data[:WEBP_HEADER]
    if len(header) == WEBP_HEADER and header[:4] == b"RIFF" and header[8:16] == b"WEBPVP8X":
        check_size(1 + int.from_bytes(header[24:27], "little"), 1 + int.from_bytes(header[27:30], "little"))


def check_parts(data: bytes) -> None:
    """Refuse, by ImageError, a file cut into so many pieces that only walking through them would take seconds."""
    png = data[:8] == b"\x89PNG\r\n\x1a\n"
    if not png and data[:2] != b"\xff\xd8":
        return
    place, parts = 8 if png else 2, 0
    while parts <= MAX_PARTS and place < len(data):
        if png:
            place += 12 + int.from_bytes(data[place : place + 4], "big")
        else:
            found = MARKER.search(data, place)
            if not found or data[found.start() + 1] in (START_OF_SCAN, END_OF_IMAGE):
                return
            place = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        parts += 1
    if parts > MAX_PARTS:
        raise ImageError("parts", f"is cut into more than {MAX_PARTS} parts; save it again")


def check_scans(data: bytes, pixels: int) -> None:
    """Refuse, by ImageError, a JPEG with so many scans that their passes over its pixels would take minutes."""
    most = min(MAX_SCANS, MAX_SCANNED_PIXELS // max(pixels, 1))
    # The bytes of the marker occur by chance too, in metadata and behind the image's end.
    if data.count(b"\xff\xda") > most and has_more_scans(data, most):
        raise ImageError("scans", f"has more than {most} scans, too many for its {pixels} pixels; save it again")


def has_more_scans(data: bytes, most: int) -> bool:
    """Whether the first image of a JPEG file has more scans than that, or more parts than MAX_PARTS. Metadata is skipped."""
    scans, parts, place = 0, 0, 2
    while scans <= most and parts <= MAX_PARTS and (found := MARKER.search(data, place)):
        kind = data[found.start() + 1]
        if kind == END_OF_IMAGE:
            return False
        scans += kind == START_OF_SCAN
        parts += 1
        place = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
    return scans > most or parts > MAX_PARTS


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation asks. The tag alone is read: other tags may be damaged, the pixels are not."""
    turn = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB. Pillow clips 16-bit grey at 255 when converting, so its high byte is taken here."""
    if image.mode.startswith("I"):
        wide = np.asarray(image)  # int32 or uint16; a wider copy of 50 megapixels would take 400 MB
        return Image.fromarray((np.clip(wide, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def resize(image: Image.Image, size: int, resize_to: int) -> NDArray[np.uint8]:
    """Shorter side to `resize_to` (antialiased bilinear), centre crop of `size`: uint8 [3, size, size], RGB.

    An image that already fits is not resampled, so 32x32 pictures pass through unchanged. Raises ImageError when the
    resized image would be smaller than the crop.
    """
    if min(image.size) != resize_to:
        image = image.resize(scaled_size(*image.size, resize_to), Image.Resampling.BILINEAR)
    if min(image.size) < size:
        raise ImageError(
            "shape", f"would be cropped to {size} pixels after a resize to {resize_to}; expected resize_to >= size"
        )
    left, top = centred(*image.size, size)
    image = image.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(image.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1))


def scaled_size(width: int, height: int, resize_to: int) -> tuple[int, int]:
    """Width and height of an image once its shorter side is `resize_to`; the longer is cut off, as in torchvision's Resize."""
    shorter = min(width, height)
    return resize_to * width // shorter, resize_to * height // shorter


def centred(width: int, height: int, size: int) -> tuple[int, int]:
    """Left and top of the square of `size` in the centre; halves go to the even pixel, as in torchvision's CenterCrop."""
    return round((width - size) / 2), round((height - size) / 2)


def preprocess(data: bytes, size: int, resize_to: int) -> NDArray[np.uint8]:
    """Encoded bytes to uint8 [3, size, size]: `decode`, then `resize`. Raises ImageError."""
    return resize(decode(data), size, resize_to)

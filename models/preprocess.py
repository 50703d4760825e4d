"""From an encoded image to the uint8 array that the network takes: the same bytes give the same array in training and serving.

Pillow and numpy alone, because the served classifier runs this same file where there is no torch.
"""

from __future__ import annotations

import contextlib
import io
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 32 * 1024 * 1024
MAX_PIXELS = 50_000_000
MAX_ASPECT = 64
# Encoders write about ten scans into a progressive JPEG. Each is a pass over all pixels (1 ns a pixel) and may take no more
# than ten bytes, so that without a bound half a megabyte is a minute's work, and the largest file an hour's.
MAX_SCANS = 30
MAX_SCANNED_PIXELS = 20 * MAX_PIXELS
# JPEG segments before the first scan, or PNG chunks: Pillow walks them in Python, and the largest file has room for
# millions of empty ones.
MAX_PARTS = 5_000
# Metadata that Pillow unpacks (3 ms a PNG chunk of 1 kB), copies (JPEG segments of EXIF, 64 kB each time) or walks in Python
# (5 ms a segment of Photoshop's). Files have one or two of a kind; 500 kB of colour profiles took 1.3 s.
MAX_METADATA = 8
PNG_METADATA = (b"iCCP", b"zTXt", b"iTXt")
JPEG_METADATA = ((0xE1, b"Exif\0\0"), (0xED, b"Photoshop"))
MAX_TAGS = 1000  # of EXIF; 65,535 took 280 ms
# A JPEG whose shorter side is at least 2 * ROOM times the one that is needed is decoded at 1/2, 1/4 or 1/8 of its size, which
# leaves ROOM times as much. With 2 instead of 4, the best class of 0.8 % of images changed instead of 0.35 %
# (docs/serving-performance.md).
ROOM = 4
PNG = b"\x89PNG\r\n\x1a\n"
MAX_TEXT = 1024 * 1024  # bytes of text in a PNG that are kept: its orientation may be in there
MAX_DROPPED = 8  # texts that are unpacked (each up to MAX_TEXT) before every further one is dropped unread
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


def decode(
    data: bytes, resize_to: int = 0, room: int = ROOM, allow: Callable[[int], None] | None = None
) -> Image.Image:
    """Decode JPEG, PNG or WebP bytes to an upright RGB image.

    The size is read from the header and bounded before any pixel is decoded. EXIF orientation is applied; grayscale,
    palette, CMYK and 16-bit images become 8-bit RGB (16-bit by its high byte). Of an animation the first frame is taken.
    resize_to: the shorter side that `resize` will make. A JPEG that is larger by far is then decoded at a fraction of its
    size, never below room * resize_to, and comes resized to it; room 0: never. allow: called with the pixels that decoding
    costs before it starts; may raise ImageError. Raises ImageError for what cannot be decoded.
    """
    with opened(data) as image:
        return decoded(image, resize_to, room, allow)


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
    data = without_large_text(data)
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


def decoded(
    image: Image.Image, resize_to: int = 0, room: int = ROOM, allow: Callable[[int], None] | None = None
) -> Image.Image:
    """The pixels of an image that `opened` gives; see `decode`."""
    width, height = image.size
    pixels, box = width * height, None
    if room * resize_to and image.format in ("JPEG", "MPO"):
        drafted = image.draft(None, (room * resize_to, room * resize_to))
        if drafted and image.size != (width, height):
            # What is left is to read the coefficients: a quarter of the time at most, half where scans are many.
            pixels, box = pixels // (2 if "progressive" in image.info else 4), drafted[1]
    if allow:
        allow(pixels)
    image.load()
    if box is None:
        return to_rgb(upright(image))
    # By the box, as the last row and column may stand for less than a whole pixel, which would shift all others.
    size = scaled_size(width, height, resize_to)
    return upright(to_rgb(image).resize(size, Image.Resampling.BILINEAR, box=box), image)


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
    """Refuse, by ImageError, a file of so many pieces, or pieces of metadata, that walking through them would take seconds."""
    png = data[:8] == b"\x89PNG\r\n\x1a\n"
    if not png and data[:2] != b"\xff\xd8":
        return
    place, parts, metadata = 8 if png else 2, 0, 0
    while parts <= MAX_PARTS and metadata <= MAX_METADATA and place < len(data):
        if png:
            metadata += data[place + 4 : place + 8] in PNG_METADATA
            place += 12 + int.from_bytes(data[place : place + 4], "big")
        else:
            found = MARKER.search(data, place)
            if not found or data[found.start() + 1] in (START_OF_SCAN, END_OF_IMAGE):
                return
            kind, start = data[found.start() + 1], found.end() + 2
            metadata += any(kind == marker and data.startswith(name, start) for marker, name in JPEG_METADATA)
            place = found.end() + int.from_bytes(data[found.end() : start], "big")
        parts += 1
    if parts > MAX_PARTS:
        raise ImageError("parts", f"is cut into more than {MAX_PARTS} parts; save it again")
    if metadata > MAX_METADATA:
        raise ImageError("parts", f"has more than {MAX_METADATA} parts of metadata; save it again without them")


def without_large_text(data: bytes) -> bytes:
    """A PNG without its colour profile, which is not used, and without text beyond MAX_TEXT bytes; other bytes as they are.

    Pillow refuses the whole image for a text or profile that unpacks to more than a megabyte.
    """
    if data[:8] != PNG or not any(kind in data for kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP")):
        return data
    kept, place, room, dropped = [data[:8]], 8, MAX_TEXT, 0
    while place < len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        kind = data[place + 4 : place + 8]
        size = text_size(kind, data[place + 8 : end - 4], room) if kind in (b"tEXt", b"zTXt", b"iTXt") else 0
        if kind != b"iCCP" and size <= room:
            kept.append(data[place:end])
            room -= size
        elif size > room:
            dropped += 1
            room = room if dropped < MAX_DROPPED else 0
        place = end
    return b"".join(kept)


def text_size(kind: bytes, body: bytes, most: int) -> int:
    """Bytes of a PNG text chunk when it is unpacked, at most one above `most`; a damaged one counts as too large."""
    if not most:
        return 1
    _, _, rest = body.partition(b"\0")
    if kind == b"tEXt" or (kind == b"iTXt" and rest[:1] == b"\0"):
        return len(body)
    packed = rest[1:] if kind == b"zTXt" else rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    try:
        return len(zlib.decompressobj().decompress(packed, most + 1))
    except zlib.error:
        return most + 1


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


def upright(image: Image.Image, tagged: Image.Image | None = None) -> Image.Image:
    """The image turned as the EXIF orientation of `tagged` (the image itself where not given) asks.

    The tag alone is read: other tags may be damaged, the pixels are not. Raises ImageError for too many tags.
    """
    tagged = tagged or image
    check_tags(tagged)
    turn = UPRIGHT.get(tagged.getexif().get(ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def check_tags(image: Image.Image) -> None:
    """Refuse, by ImageError, EXIF with so many tags that reading them would take long."""
    tiff = (image.info.get("exif") or b"").removeprefix(b"Exif\0\0")
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"
    start = int.from_bytes(tiff[4:8], order)
    as_text = len(image.info.get("Raw profile type exif", ""))  # hexadecimal, in the text of a PNG; a tag has 12 bytes
    if max(int.from_bytes(tiff[start : start + 2], order), as_text // 24) > MAX_TAGS:
        raise ImageError("parts", f"has more than {MAX_TAGS} EXIF tags; save it again without them")


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


def preprocess(
    data: bytes, size: int, resize_to: int, room: int = ROOM, allow: Callable[[int], None] | None = None
) -> NDArray[np.uint8]:
    """Encoded bytes to uint8 [3, size, size]: `decode`, then `resize`. Raises ImageError."""
    return resize(decode(data, resize_to, room, allow), size, resize_to)

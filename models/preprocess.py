"""From an encoded image to the uint8 array that the network takes: the same bytes give the same array in training and serving.

Pillow and numpy alone, because the served classifier runs this same file where there is no torch.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
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
# Pillow parses metadata when it opens a file (EXIF of 480 kB took 496 MiB, a segment of MPF 60 ms, 500 kB of colour profiles
# 1.3 s), so that it gets JPEG and PNG files without any. Files have one or two pieces of a kind.
MAX_METADATA = 8
PNG_METADATA = (b"iCCP", b"zTXt", b"iTXt")
PNG_DROPPED = (*PNG_METADATA, b"tEXt", b"eXIf")
JPEG_METADATA = ((0xE1, b"Exif\0\0"), (0xED, b"Photoshop"))
# Frames, tables, the scan, JFIF and Adobe's segment, which name the colour space. Pillow and libjpeg take no other to decode.
JPEG_KEPT = frozenset((*range(0xC0, 0xC8), *range(0xC9, 0xD0), 0xDA, 0xDB, 0xDC, 0xDD, 0xE0, 0xEE))
MAX_TAGS = 1000  # of EXIF
TAG_WIDTHS = bytes((0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8))  # bytes of a value, by the type's number
# A JPEG whose shorter side is at least 2 * ROOM times the one that is needed is decoded at 1/2, 1/4 or 1/8 of its size, which
# leaves ROOM times as much. With 2 instead of 4, the best class of 0.8 % of images changed instead of 0.35 %
# (docs/serving-performance.md).
ROOM = 4
PNG = b"\x89PNG\r\n\x1a\n"
MAX_TEXT = 1024 * 1024  # bytes of a PNG's text that are unpacked: its orientation may be in there
WEBP_HEADER = 30  # bytes
ORIENTATION = 0x0112  # the EXIF tag, and how to turn the picture upright for each of its values but 1
ORIENTATION_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0%c\0\0\0\0\0\0"  # with that tag alone
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
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

    Of its metadata the image has the orientation alone, as EXIF, where the picture has to be turned.

    Raises ImageError for what is refused, and in the place of whatever a decoder raises within the block.
    """
    if len(data) == 0:
        raise ImageError("empty", "is empty (0 bytes); expected a JPEG, PNG or WebP image")
    if len(data) > MAX_BYTES:
        raise ImageError("bytes", f"has {len(data)} bytes, above the limit of {MAX_BYTES}")
    check_webp_canvas(data)
    data, exif, xmp = without_metadata(data)
    try:
        # Image.open reads headers only. Its own bomb check is replaced by the tighter bound below, checked before load.
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(*image.size)
            if image.format == "JPEG":
                check_scans(data, image.width * image.height)
            # Of a WebP, from its decoder, which does not parse them.
            exif, xmp = image.info.pop("exif", exif), image.info.pop("xmp", xmp)
            if (turn := orientation(exif, xmp)) in UPRIGHT:
                image.info["exif"] = ORIENTATION_EXIF % turn
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
    if room * resize_to and image.format == "JPEG":
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


def without_metadata(data: bytes) -> tuple[bytes, bytes, bytes]:
    """A JPEG or PNG file with only the parts that its pixels need, its EXIF, and its XMP; any other file as it is.

    Bytes between JPEG segments are dropped too: Pillow reads them one by one, fill bytes at 0.6 s a megabyte.
    Raises ImageError for a file of so many parts, or parts of metadata, that reading them would take seconds.
    """
    if data[:8] != PNG and data[:3] != b"\xff\xd8\xff":
        return data, b"", b""
    kept, metadata, exif, text, xmp = [memoryview(data)[: 8 if data[:8] == PNG else 2]], 0, b"", b"", b""
    for number, (kind, start, body, end) in enumerate(parts(data)):
        name, content = data[body : body + 32], memoryview(data)[body:end]
        if kind in JPEG_KEPT or (isinstance(kind, bytes) and kind not in PNG_DROPPED):
            kept.append(memoryview(data)[start:end])
        elif (kind, name[:6]) == (0xE1, b"Exif\0\0"):
            exif += content[6:] if exif else content
        elif kind == 0xE1 and name.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = bytes(content)
        elif kind == b"eXIf":
            exif = bytes(content[:-4])
        elif isinstance(kind, bytes) and name.startswith(b"Raw profile type exif\0"):
            text = kind + content[:-4]
        elif isinstance(kind, bytes) and name.startswith(b"XML:com.adobe.xmp\0"):
            xmp = kind + content[:-4]
        metadata += kind in PNG_METADATA or any(kind == code and name.startswith(tag) for code, tag in JPEG_METADATA)
        if number >= MAX_PARTS:
            raise ImageError("parts", f"is cut into more than {MAX_PARTS} parts; save it again")
        if metadata > MAX_METADATA:
            raise ImageError("parts", f"has more than {MAX_METADATA} parts of metadata; save it again without them")
    if text and not exif:
        with contextlib.suppress(ValueError):  # hexadecimal, behind a line each of nothing, a name and a length
            exif = bytes.fromhex(b"".join(png_text(text).split(b"\n", 3)[3:]).decode("ascii"))
    return b"".join(kept), exif, png_text(xmp) if data[:8] == PNG else xmp


def parts(data: bytes) -> Iterator[tuple[int | bytes, int, int, int]]:
    """Kind, start, start of the content, and end of every JPEG segment or PNG chunk; the first scan goes to the file's end."""
    if data[:8] == PNG:
        kind, end = b"", 8
        while end < len(data) and kind != b"IEND":
            start, kind = end, data[end + 4 : end + 8]
            end += 12 + int.from_bytes(data[start : start + 4], "big")
            yield kind, start, start + 8, end
        return
    marker, end = 0, 2
    while marker != START_OF_SCAN and (found := MARKER.search(data, end)):
        marker, body = data[found.start() + 1], found.end() + 2
        if marker == END_OF_IMAGE:
            return
        end = max(body, found.end() + int.from_bytes(data[found.end() : body], "big"))
        yield marker, found.start(), body, len(data) if marker == START_OF_SCAN else end


def png_text(chunk: bytes) -> bytes:
    """At most MAX_TEXT bytes of the text in a PNG chunk, given from its kind on; empty where it is damaged."""
    kind, text = chunk[:4], chunk[4:].partition(b"\0")[2]
    packed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
    if kind == b"iTXt":
        text = text[2:].split(b"\0", 2)[-1]  # behind a language and a translated keyword
    try:
        return zlib.decompressobj().decompress(text[kind == b"zTXt" :], MAX_TEXT) if packed else text[:MAX_TEXT]
    except zlib.error:
        return b""


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

    The tag alone is read: other tags may be damaged, the pixels are not. Raises ImageError as `orientation`.
    """
    tagged = tagged or image
    orientation(tagged.info.get("exif") or b"", b"")  # bounds what Pillow parses of an image that a caller has opened
    turn = UPRIGHT.get(tagged.getexif().get(ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def orientation(exif: bytes, xmp: bytes) -> int:
    """The orientation that EXIF names, else XMP, else 1; as Pillow reads it, which copies the values of all tags.

    Raises ImageError for too many tags, and where the values overlap: 1,000 tags may share the same megabytes.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"
    start, value, total = int.from_bytes(tiff[4:8], order) + 2, None, 0
    tags = int.from_bytes(tiff[max(start, 10) - 2 : start], order)  # none within the header
    if tags > MAX_TAGS:
        raise ImageError("parts", f"has more than {MAX_TAGS} EXIF tags; save it again without them")
    entries = tiff[start : start + 12 * min(tags, max(len(tiff) - start, 0) // 12)]
    for tag, kind, count, field in struct.iter_unpack("<HHI4s" if order == "little" else ">HHI4s", entries):
        width = TAG_WIDTHS[kind] if kind < len(TAG_WIDTHS) else 0
        if 4 < count * width <= len(tiff) - int.from_bytes(field, order):
            total += count * width
        if tag == ORIENTATION and kind in (3, 4) and 0 < count * width <= 4:  # short or long; the first of them
            value = int.from_bytes(field[:width], order)
    if total > len(tiff):
        raise ImageError("parts", "has EXIF tags whose values overlap; save it again without them")
    found = XMP_ORIENTATION.search(xmp) if value is None else None
    return int(found[1]) if found else value or 1


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

"""Image preprocessing: encoded bytes to the network's uint8 input, with identical results in training and serving.

Imports only Pillow and numpy, because the served classifier imports this file without torch.
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
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}  # both antialiased
MAX_BYTES = 32 * 1024 * 1024
MAX_PIXELS = 50_000_000
MAX_ASPECT = 64
# Limits on scans of a progressive JPEG. Encoders write about ten. Each scan is a pass over all pixels (1 ns per pixel)
# and can be as short as ten bytes: without a limit, half a megabyte could take a minute to decode and the largest file
# an hour.
MAX_SCANS = 30
MAX_SCANNED_PIXELS = 20 * MAX_PIXELS
# JPEG segments before the first scan, or PNG chunks. Pillow reads them in Python, and the largest file can hold
# millions of empty ones.
MAX_PARTS = 5_000
# Pillow parses metadata when it opens a file (480 kB of EXIF took 496 MiB, an MPF segment 60 ms, 500 kB of colour
# profiles 1.3 s). Therefore it receives JPEG and PNG files without metadata. Valid JPEG files have one or two parts of a
# kind; texts of a PNG are dropped without decompression.
MAX_METADATA = 8
PNG_DROPPED = (b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"eXIf")
JPEG_METADATA = ((0xE1, b"Exif\0\0"), (0xED, b"Photoshop"))
# Frames, tables, the scan, and the JFIF and Adobe segments, which define the colour space. Decoding in Pillow and
# libjpeg uses no other segments.
JPEG_PIXEL_SEGMENTS = frozenset((*range(0xC0, 0xC8), *range(0xC9, 0xD0), 0xDA, 0xDB, 0xDC, 0xDD, 0xE0, 0xEE))
MAX_TAGS = 1000  # of EXIF
TAG_WIDTHS = bytes((0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8))  # bytes of a value, by type
# A JPEG whose shorter side is at least 2 * ROOM times the needed size is decoded at 1/2, 1/4 or 1/8 of its size, so
# that at least ROOM times the needed size remains. With 2 instead of 4, the predicted class changed for 0.8 % of images
# instead of 0.35 % (docs/serving-performance.md).
ROOM = 4
PNG = b"\x89PNG\r\n\x1a\n"
MAX_TEXT = 1024 * 1024  # bytes of decompressed text of a PNG, which may hold the orientation
WEBP_HEADER = 30  # bytes
ORIENTATION = 0x0112  # EXIF tag; UPRIGHT maps its values except 1 to the transposition
ORIENTATION_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0%c\0\0\0\0\0\0"  # EXIF with only this tag
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
# A marker of a JPEG stream that starts a segment or is the end of the image: no stuffed byte, no restart, no fill byte.
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
    """An image that cannot be used; the message is safe to return to a client (no path, no memory address).

    kind: the fault as one word: empty, bytes, format, pixels, shape, parts, scans or damaged.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def decode(
    data: bytes,
    resize_to: int = 0,
    room: int = ROOM,
    allow: Callable[[int], None] | None = None,
    interpolation: str = "bilinear",
) -> Image.Image:
    """Decode JPEG, PNG or WebP bytes to an upright RGB image.

    The size is read from the header and checked against the limits before any pixel is decoded. EXIF orientation is
    applied. Grayscale, palette, CMYK and 16-bit images become 8-bit RGB (16-bit by its high byte). Of an animation, the
    first frame is used.

    resize_to: the shorter side after a later `resize`. A JPEG that is much larger is decoded at a fraction of its size,
    at least room * resize_to, and returned resized to resize_to; room 0 disables this. allow: called before decoding
    starts with the number of pixels that decoding costs; may raise ImageError. Raises ImageError if the image cannot be
    decoded.
    """
    with opened(data) as image:
        return decoded(image, resize_to, room, allow, interpolation)


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """Open JPEG, PNG or WebP bytes: headers are read and checked, no pixel is decoded. Closed at the end of the block.

    The image has no metadata except the orientation, as EXIF, if the picture has to be rotated or mirrored. Raises
    ImageError for a rejected image, and in place of any exception that a decoder raises within the block.
    """
    if len(data) == 0:
        raise ImageError("empty", "is empty (0 bytes); expected a JPEG, PNG or WebP image")
    if len(data) > MAX_BYTES:
        raise ImageError("bytes", f"has {len(data)} bytes, above the limit of {MAX_BYTES}")
    check_webp_canvas(data)
    data, exif, xmp = without_metadata(data)
    try:
        # Image.open reads only headers. Its own check for decompression bombs is replaced by the stricter limits here,
        # which are checked before load().
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(*image.size)
            if image.format == "JPEG":
                check_scans(data, image.width * image.height)
            # For WebP, the decoder returns both without parsing them.
            exif, xmp = image.info.pop("exif", exif), image.info.pop("xmp", xmp)
            if (transposition := orientation(exif, xmp)) in UPRIGHT:
                image.info["exif"] = ORIENTATION_EXIF % transposition
            yield image
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError("format", "is not a JPEG, PNG or WebP image") from None
    except Image.DecompressionBombError:
        raise ImageError("pixels", f"has more pixels than the limit of {MAX_PIXELS}") from None
    except Exception:
        # Pillow's parsers raise many types for damaged data: OSError, SyntaxError, ValueError, TypeError, struct.error.
        raise ImageError("damaged", "is damaged or truncated: its pixels cannot be decoded") from None


def decoded(
    image: Image.Image,
    resize_to: int = 0,
    room: int = ROOM,
    allow: Callable[[int], None] | None = None,
    interpolation: str = "bilinear",
) -> Image.Image:
    """Decode the pixels of an image from `opened`; see `decode`."""
    width, height = image.size
    pixels, box = width * height, None
    if room * resize_to and image.format == "JPEG":
        drafted = image.draft(None, (room * resize_to, room * resize_to))
        if drafted and image.size != (width, height):
            # The remaining cost is reading the coefficients: at most a quarter of the time, half with many scans.
            pixels, box = pixels // (2 if "progressive" in image.info else 4), drafted[1]
    if allow:
        allow(pixels)
    image.load()
    if box is None:
        return to_rgb(upright(image))
    # With the box, because the last row and column may cover less than a whole pixel; without it all others would be
    # shifted.
    size = scaled_size(width, height, resize_to)
    return upright(to_rgb(image).resize(size, FILTERS[interpolation], box=box), image)


def check_size(width: int, height: int) -> None:
    """Raise ImageError if the size in the header exceeds the pixel limit or the aspect ratio would make a resize too large."""
    if width * height > MAX_PIXELS:
        raise ImageError("pixels", f"has {width}x{height} = {width * height} pixels, above the limit of {MAX_PIXELS}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError("shape", f"is {width}x{height}, its longer side above {MAX_ASPECT} times its shorter side")


def check_webp_canvas(data: bytes) -> None:
    """Raise ImageError for a WebP with a too large canvas: its decoder allocates memory for the whole canvas at once."""
    header = data[:WEBP_HEADER]
    if len(header) == WEBP_HEADER and header[:4] == b"RIFF" and header[8:16] == b"WEBPVP8X":
        check_size(1 + int.from_bytes(header[24:27], "little"), 1 + int.from_bytes(header[27:30], "little"))


def without_metadata(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Remove metadata from a JPEG or PNG file; returns the file, its EXIF and its XMP.

    Other files are returned unchanged.

    Bytes between JPEG segments are removed too: Pillow reads them one by one, fill bytes at 0.6 s per megabyte. Raises
    ImageError for a file with so many parts, or a JPEG with so many of metadata, that reading them would take seconds.
    """
    if data[:8] != PNG and data[:3] != b"\xff\xd8\xff":
        return data, b"", b""
    chunks, metadata, exif, text, xmp = [memoryview(data)[: 8 if data[:8] == PNG else 2]], 0, b"", b"", b""
    for number, (kind, start, body, end) in enumerate(parts(data)):
        name, content = data[body : body + 32], memoryview(data)[body:end]
        if kind in JPEG_PIXEL_SEGMENTS or (isinstance(kind, bytes) and kind not in PNG_DROPPED):
            chunks.append(memoryview(data)[start:end])
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
        metadata += any(kind == code and name.startswith(tag) for code, tag in JPEG_METADATA)
        if number >= MAX_PARTS:
            raise ImageError("parts", f"is cut into more than {MAX_PARTS} parts; save it again")
        if metadata > MAX_METADATA:
            raise ImageError("parts", f"has more than {MAX_METADATA} parts of metadata; save it again without them")
    if text and not exif:
        with contextlib.suppress(ValueError):  # hexadecimal, after an empty line, a name and a length, one line each
            exif = bytes.fromhex(b"".join(png_text(text).split(b"\n", 3)[3:]).decode("ascii"))
    return b"".join(chunks), exif, png_text(xmp) if data[:8] == PNG else xmp


def parts(data: bytes) -> Iterator[tuple[int | bytes, int, int, int]]:
    """Yield kind, start, start of content, and end of every JPEG segment or PNG chunk; the first scan ends with the file."""
    if data[:8] == PNG:
        kind, end = b"", 8
        while end < len(data) and kind != b"IEND":
            start, kind = end, data[end + 4 : end + 8]
            end += 12 + int.from_bytes(data[start : start + 4], "big")
            yield kind, start, start + 8, end
        return
    marker, end = 0, 2
    while marker != START_OF_SCAN and (marker_match := MARKER.search(data, end)):
        marker, body = data[marker_match.start() + 1], marker_match.end() + 2
        if marker == END_OF_IMAGE:
            return
        end = max(body, marker_match.end() + int.from_bytes(data[marker_match.end() : body], "big"))
        yield marker, marker_match.start(), body, len(data) if marker == START_OF_SCAN else end


def png_text(chunk: bytes) -> bytes:
    """At most MAX_TEXT bytes of the text in a PNG chunk, which is given from its kind on; empty if the chunk is damaged."""
    kind, text = chunk[:4], chunk[4:].partition(b"\0")[2]
    packed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
    if kind == b"iTXt":
        text = text[2:].split(b"\0", 2)[-1]  # after a language and a translated keyword
    try:
        return zlib.decompressobj().decompress(text[kind == b"zTXt" :], MAX_TEXT) if packed else text[:MAX_TEXT]
    except zlib.error:
        return b""


def check_scans(data: bytes, pixels: int) -> None:
    """Raise ImageError for a JPEG with so many scans that decoding all passes over its pixels would take minutes."""
    most = min(MAX_SCANS, MAX_SCANNED_PIXELS // max(pixels, 1))
    if data.count(b"\xff\xda") <= most:
        return
    # The marker bytes can also occur by chance, in metadata, which is skipped, and after the end of the image.
    scans, parts, position = 0, 0, 2
    while scans <= most and parts <= MAX_PARTS and (marker_match := MARKER.search(data, position)):
        kind = data[marker_match.start() + 1]
        if kind == END_OF_IMAGE:
            return
        scans += kind == START_OF_SCAN
        parts += 1
        position = marker_match.end() + int.from_bytes(data[marker_match.end() : marker_match.end() + 2], "big")
    if scans > most or parts > MAX_PARTS:
        raise ImageError("scans", f"has more than {most} scans, too many for its {pixels} pixels; save it again")


def upright(image: Image.Image, tagged: Image.Image | None = None) -> Image.Image:
    """Rotate or mirror the image according to the EXIF orientation of `tagged` (default: the image itself).

    Only this tag is read: other tags may be damaged even if the pixels are valid. Raises ImageError as `orientation`
    does.
    """
    tagged = tagged or image
    orientation(tagged.info.get("exif") or b"", b"")  # limits what Pillow parses of an image opened by a caller
    transposition = UPRIGHT.get(tagged.getexif().get(ORIENTATION, 1))
    return image if transposition is None else image.transpose(transposition)


def orientation(exif: bytes, xmp: bytes) -> int:
    """Orientation from EXIF, else from XMP, else 1. Same result as Pillow, which copies the values of all tags.

    Raises ImageError for too many tags, and for overlapping values: 1,000 tags can refer to the same megabytes.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"
    start, value, total = int.from_bytes(tiff[4:8], order) + 2, None, 0
    tags = int.from_bytes(tiff[max(start, 10) - 2 : start], order)  # 0 if the offset points into the header
    if tags > MAX_TAGS:
        raise ImageError("parts", f"has more than {MAX_TAGS} EXIF tags; save it again without them")
    entries = tiff[start : start + 12 * min(tags, max(len(tiff) - start, 0) // 12)]
    for tag, kind, count, field in struct.iter_unpack("<HHI4s" if order == "little" else ">HHI4s", entries):
        width = TAG_WIDTHS[kind] if kind < len(TAG_WIDTHS) else 0
        if 4 < count * width <= len(tiff) - int.from_bytes(field, order):
            total += count * width
        if tag == ORIENTATION and kind in (3, 4) and 0 < count * width <= 4:  # short or long; only its first value
            value = int.from_bytes(field[:width], order)
    if total > len(tiff):
        raise ImageError("parts", "has EXIF tags whose values overlap; save it again without them")
    tag_in_xmp = XMP_ORIENTATION.search(xmp) if value is None else None
    return int(tag_in_xmp[1]) if tag_in_xmp else value or 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB. Pillow clips 16-bit grey at 255 when converting, so the high byte is used."""
    if image.mode.startswith("I"):
        wide = np.asarray(image)  # int32 or uint16; a wider copy of 50 megapixels takes 400 MB
        return Image.fromarray((np.clip(wide, 0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def resize(image: Image.Image, size: int, resize_to: int, interpolation: str = "bilinear") -> NDArray[np.uint8]:
    """Resize the shorter side to `resize_to` (antialiased) and crop the centre: uint8 [3, size, size], RGB.

    An image whose shorter side already fits is not resampled, so 32x32 images are unchanged. Raises ImageError when the
    resized image would be smaller than the crop.
    """
    if min(image.size) != resize_to:
        image = image.resize(scaled_size(*image.size, resize_to), FILTERS[interpolation])
    if min(image.size) < size:
        raise ImageError(
            "shape", f"would be cropped to {size} pixels after a resize to {resize_to}; expected resize_to >= size"
        )
    left, top = centred(*image.size, size)
    image = image.crop((left, top, left + size, top + size))
    return np.ascontiguousarray(np.asarray(image.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1))


def letterbox(
    image: Image.Image, height: int, width: int, fill: tuple[int, int, int]
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Resize an image to fit into height x width, keeping its ratio, and pad it at the bottom and at the right with `fill`.

    Returns uint8 [3,height,width], RGB, and the height and width that the image takes in it. An image that fits exactly
    is not resampled.
    """
    if image.height * width >= image.width * height:
        inside = height, max(1, round(image.width * height / image.height))
    else:
        inside = max(1, round(image.height * width / image.width)), width
    if (image.height, image.width) != inside:
        image = image.resize(inside[::-1], FILTERS["bilinear"])
    canvas = np.empty((3, height, width), dtype=np.uint8)
    canvas[:] = np.array(fill, dtype=np.uint8)[:, None, None]
    canvas[:, : inside[0], : inside[1]] = np.asarray(image.convert("RGB"), dtype=np.uint8).transpose(2, 0, 1)
    return canvas, inside


def scaled_size(width: int, height: int, resize_to: int) -> tuple[int, int]:
    """Width and height after resizing the shorter side to `resize_to`; the longer is truncated, as in torchvision's Resize."""
    shorter = min(width, height)
    return resize_to * width // shorter, resize_to * height // shorter


def centred(width: int, height: int, size: int) -> tuple[int, int]:
    """Left and top of the centred square of side `size`; halves are rounded to even, as in torchvision's CenterCrop."""
    return round((width - size) / 2), round((height - size) / 2)


def preprocess(
    data: bytes,
    size: int,
    resize_to: int,
    room: int = ROOM,
    allow: Callable[[int], None] | None = None,
    interpolation: str = "bilinear",
) -> NDArray[np.uint8]:
    """Encoded bytes to uint8 [3, size, size]: `decode`, then `resize`. interpolation: a key of FILTERS. Raises ImageError."""
    return resize(decode(data, resize_to, room, allow, interpolation), size, resize_to, interpolation)

"""Image files that a server must reject before decoding, and parts to build them."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from functools import cache

from PIL import Image


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def solid_webp(side: int) -> bytes:
    """Return a lossless WebP of side x side pixels in one colour: 36 bytes."""
    one = saved(Image.new("RGB", (1, 1), "red"), "WEBP", lossless=True)
    sizes = int.from_bytes(one[21:25], "little") & ~(2**28 - 1) | (side - 1) | (side - 1) << 14
    return one[:21] + sizes.to_bytes(4, "little") + one[25:]


def shared_exif() -> bytes:
    """Return EXIF with 999 tags that share the same 50 kB value, which Pillow would copy for each tag."""
    entries = b"".join(struct.pack(">HHII", 1000 + tag, 1, 50_000, 14 + 12 * 999) for tag in range(999))
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", 999) + entries + bytes(4 + 50_000)


@cache
def hostile_images() -> dict[str, bytes]:
    """Return image files that a server must reject before decoding, by fault."""
    red = Image.new("RGB", (16, 16), "red")
    png, jpeg = saved(red, "PNG"), saved(red, "JPEG")
    progressive = saved(Image.new("L", (64, 64), 100), "JPEG", progressive=True)
    last_scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    return {
        "empty": b"",
        "text": b"a letter",
        "zeros": bytes(1000),
        "gif": saved(red, "GIF"),
        "bmp": saved(red, "BMP"),
        "tiff": saved(red, "TIFF"),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "zip": b"PK\3\4" + png,
        "gif before png": b"GIF89a" + png,
        "script before jpeg": b"#!/bin/sh\n" + jpeg,
        "cut png": png[: len(png) // 2],
        "cut jpeg": saved(Image.effect_noise((64, 64), 90), "JPEG")[:700],
        "bomb by header": png[:8] + header + png[33:],
        "thread": saved(Image.new("RGB", (1000, 1)), "PNG"),
        "canvas": b"RIFF\x64\0\0\0WEBPVP8X\n\0\0\0\x10\0\0\0\xfe\x3f\0\xfe\x3f\0" + bytes(70),
        "many scans": progressive[:-2] + last_scan * 200 + progressive[-2:],
        "many segments": jpeg[:2] + b"\xff\xfe\0\2" * 30_000 + jpeg[2:],
        "many chunks": png[:33] + chunk(b"prVt", b"") * 30_000 + png[33:],
        "49 megapixels in 36 bytes": solid_webp(7000),
        "16 megapixels and one more row": saved(Image.new("1", (4000, 4001)), "PNG"),
        "many exif tags": png[:33] + chunk(b"eXIf", b"II*\0\x08\0\0\0\xff\xff" + bytes(786_424)) + png[33:],
        "exif tags that share their values": png[:33] + chunk(b"eXIf", shared_exif()) + png[33:],
        "many exif segments": jpeg[:2] + (b"\xff\xe1\xf0\x02Exif\0\0" + bytes(61_434)) * 200 + jpeg[2:],
        "many photoshop blocks": jpeg[:2]
        + (b"\xff\xed\xef\xf8Photoshop 3.0\0" + b"8BIM\0\1\0\0\0\0\0\0" * 5118) * 9
        + jpeg[2:],
        "wrong checksum": png[:40] + bytes([png[40] ^ 255]) + png[41:],
        "no pixels": png[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0)) + png[33:],
        "above the bytes of an image": jpeg + bytes(33 * 1024 * 1024),
    }


def data_url(image: bytes) -> bytes:
    """Encode an image as a data URL, as in a JSON request."""
    return b"data:image/png;base64," + base64.b64encode(image)

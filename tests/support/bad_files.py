"""Image files that the server rejects, with the fault named in the response."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from conftest import SIZE, encode, picture
from PIL import Image

from tests.support.bad_images import chunk, saved

PIXELS = np.random.default_rng(3).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def header_of_100_megapixels() -> bytes:
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    return png(chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(b"\0" * 100)))


BAD = {
    "truncated.png": (picture(1)[:80], "is damaged or truncated"),
    "truncated.jpg": (saved(Image.fromarray(PIXELS), "JPEG")[:400], "is damaged or truncated"),
    "text.jpg": (b"this is a letter, not a picture", "is not a JPEG, PNG or WebP image"),
    "empty.jpg": (b"", "is empty (0 bytes)"),
    "huge.png": (header_of_100_megapixels(), "has 10000x10000 = 100000000 pixels, above the limit"),
    "animation.gif": (saved(Image.fromarray(PIXELS), "GIF"), "is not a JPEG, PNG or WebP image"),
    "thread.png": (encode(np.zeros((1, 500, 3), dtype=np.uint8)), "is 500x1"),
    "odd-header.png": (png(chunk(b"IHDR", b"\0")), "is damaged"),
}

"""Files that cost a decoder far more than their size; each is refused at once, and its honest neighbour is not."""

from __future__ import annotations

import io
import struct
import time
import zlib

import pytest
from PIL import Image

from models import preprocess
from models.preprocess import MAX_PARTS, MAX_SCANS, ImageError, decode


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


RED = Image.new("RGB", (16, 16), "red")
JPEG, PNG = saved(RED, "JPEG"), saved(RED, "PNG")
PROGRESSIVE = saved(Image.new("L", (3000, 3000), 100), "JPEG", progressive=True)
LAST_SCAN = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2]
EMPTY_SEGMENT = b"\xff\xfe\0\2"


def with_scans(more: int) -> bytes:
    return PROGRESSIVE[:-2] + LAST_SCAN * more + PROGRESSIVE[-2:]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (with_scans(300), "scans"),
        (JPEG[:2] + EMPTY_SEGMENT * 4_000_000 + JPEG[2:], "parts"),
        (PNG[:33] + chunk(b"prVt", b"") * 500_000 + PNG[33:], "parts"),
        (PROGRESSIVE[:-2] + LAST_SCAN * 101 + b"\xff\xfe\0\4\xff\xda" * 3_000_000, "scans"),
        (b"RIFF\x64\0\0\0WEBPVP8X\n\0\0\0\x10\0\0\0\xfe\x3f\0\xfe\x3f\0" + bytes(70), "pixels"),
        (b"GIF89a" + PNG, "format"),
        (b"#!/bin/sh\n" + JPEG, "format"),
        (PNG[:33] + chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(50_000_000))) + PNG[33:], "damaged"),
    ],
    ids=["scans", "segments", "chunks", "scans hidden in segments", "canvas", "gif first", "script first", "profile"],
)
def test_file_that_would_stall_a_decoder_is_refused_at_once(data: bytes, kind: str) -> None:
    started = time.process_time()
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert caught.value.kind == kind
    assert time.process_time() - started < 2


def test_limits_are_above_what_honest_files_have() -> None:
    assert decode(PROGRESSIVE).size == (3000, 3000)
    assert decode(with_scans(MAX_SCANS // 2 - 10)).size == (3000, 3000)
    assert decode(JPEG[:2] + EMPTY_SEGMENT * (MAX_PARTS - 100) + JPEG[2:]).size == (16, 16)


def test_what_follows_the_image_is_not_counted_as_scans() -> None:
    assert decode(JPEG + b"\xff\xda" * 100_000).size == (16, 16)


def test_scan_limit_shrinks_with_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "MAX_SCANNED_PIXELS", 8 * 3000 * 3000)
    assert decode(PROGRESSIVE).size == (3000, 3000)
    with pytest.raises(ImageError, match=r"has more than 8 scans, too many for its 9000000 pixels"):
        decode(with_scans(4))

"""Image files that cost a decoder far more than their size are rejected early; similar valid files are accepted."""

from __future__ import annotations

import contextlib
import io
import struct
import time
import tracemalloc
import zlib

import pytest
from PIL import Image

from models import preprocess
from models.preprocess import MAX_METADATA, MAX_PARTS, MAX_SCANS, MAX_TAGS, ImageError, decode, opened


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
MEGABYTE = zlib.compress(bytes(1_000_000), 9)  # a kilobyte


def tags(count: int) -> bytes:
    """Return EXIF with `count` tags, the first an orientation of a quarter turn."""
    entries = b"".join(struct.pack("<HHII", 0x112 + tag, 3, 1, 6) for tag in range(count))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", count) + entries + bytes(4)


TAGS = tags(65_000)


def shared_tags(size: int, count: int = 999) -> bytes:
    """Return EXIF whose tags share the same value of `size` bytes."""
    entries = b"".join(struct.pack(">HHII", 1000 + tag, 1, size, 14 + 12 * count) for tag in range(count))
    return b"MM\0*\0\0\0\x08" + struct.pack(">H", count) + entries + bytes(4 + size)


def webp_with(exif: bytes) -> bytes:
    return saved(RED, "WEBP", lossless=True, exif=exif)


def as_text(exif: bytes) -> bytes:
    """Embed EXIF in a PNG's compressed text."""
    return chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n9\n" + exif.hex().encode()))


SHARED = shared_tags(50_000)
MPF = b"MPF\0MM\0*\0\0\0\x08" + struct.pack(">H", 5400) + struct.pack(">HHII", 1, 4, 1, 4000) * 5400


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


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
        (PNG[:33] + chunk(b"iCCP", b"x\0\0" + MEGABYTE) * 20_000 + PNG[33:], "parts"),
        (JPEG[:2] + segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 500 + JPEG[2:], "parts"),
        (JPEG[:2] + segment(0xED, b"Photoshop 3.0\0" + b"8BIM\0\1\0\0\0\0\0\0" * 5000) * 500 + JPEG[2:], "parts"),
        (PNG[:33] + chunk(b"eXIf", TAGS) + PNG[33:], "parts"),
        (
            PNG[:33] + chunk(b"tEXt", b"Raw profile type exif\0\nexif\n9\n" + tags(40_000).hex().encode()) + PNG[33:],
            "parts",
        ),
        (JPEG[:2] + segment(0xE1, b"Exif\0\0" + TAGS[:60_000]) + JPEG[2:], "parts"),
        (b"GIF89a" + PNG, "format"),
        (b"#!/bin/sh\n" + JPEG, "format"),
    ],
    ids=[
        "scans",
        "segments",
        "chunks",
        "scans hidden in segments",
        "canvas",
        "profiles",
        "exif segments",
        "photoshop blocks",
        "exif tags",
        "exif tags as text",
        "exif tags in segments",
        "gif first",
        "script first",
    ],
)
def test_file_that_would_stall_a_decoder_is_rejected_at_once(data: bytes, kind: str) -> None:
    started = time.process_time()
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert caught.value.kind == kind
    assert time.process_time() - started < 0.3


@pytest.mark.parametrize(
    "data",
    [
        PNG[:33] + chunk(b"eXIf", SHARED) + PNG[33:],
        PNG[:-12] + chunk(b"eXIf", SHARED) + PNG[-12:],
        PNG[:33] + as_text(SHARED) + PNG[33:],
        JPEG[:2] + segment(0xE1, b"Exif\0\0" + SHARED) + JPEG[2:],
        webp_with(SHARED),
        webp_with(b"Exif\0\0" + SHARED),
    ],
    ids=["png", "png behind pixels", "png text", "jpeg", "webp", "webp with prefix"],
)
def test_exif_whose_tags_share_their_values_is_rejected_before_they_are_copied(data: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(ImageError, match="EXIF tags whose values overlap") as caught:
        decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.kind == "parts"
    assert peak < 1_000_000, "all values together have 50 MB"


@pytest.mark.parametrize("hidden_behind", [b"\xff\xc8\xff\xff", b"\xff\xf0\xff\xff", b"\xff\xd9"])
def test_exif_that_only_pillow_would_see_is_never_parsed(hidden_behind: bytes) -> None:
    data = JPEG[:2] + hidden_behind + segment(0xE1, b"Exif\0\0" + SHARED) + bytes(3_518) + JPEG[2:]
    tracemalloc.start()
    with contextlib.suppress(ImageError):
        decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize(
    "data",
    [
        JPEG[:2] + segment(0xE2, MPF) + JPEG[2:],
        JPEG[:2]
        + b"".join(segment(0xE1, b"Exif\0\0" + TAGS[at : at + 65_000]) for at in range(0, 455_000, 65_000))
        + JPEG[20:],  # without the JFIF segment, from which Pillow would take the resolution first
        JPEG[:20] + bytes(300_000) + JPEG[20:],
        PNG[:33] + chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1_048_577), 9)) * 60 + PNG[33:],
        PNG[:-12] + chunk(b"iTXt", b"x\0\1\0\0\0" + MEGABYTE) * 60 + PNG[-12:],
    ],
    ids=["pictures of a second format", "tags in seven segments", "bytes between segments", "texts", "texts behind"],
)
def test_metadata_that_is_not_used_costs_no_time(data: bytes) -> None:
    times = []
    for _ in range(5):
        started = time.process_time()
        with contextlib.suppress(ImageError):
            decode(data)
        times.append(time.process_time() - started)
    assert min(times) < 0.003


def test_what_follows_the_end_of_a_png_is_not_counted_as_parts() -> None:
    assert decode(PNG + bytes(600_000)).size == (16, 16)


@pytest.mark.parametrize("data", [JPEG, PNG], ids=["jpeg", "png"])
def test_pillow_gets_no_metadata_but_the_orientation(data: bytes) -> None:
    turned, kinds = tags(1), (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
    if data == PNG:
        data = data[:33] + b"".join(chunk(kind, b"x\0\0\0\0\0") for kind in kinds) + chunk(b"eXIf", turned) + data[33:]
    else:
        others = [segment(marker, b"ICC_PROFILE\0\1\1Photoshop 3.0\0") for marker in (*range(0xE1, 0xEE), 0xEF, 0xFE)]
        data = data[:2] + segment(0xE1, b"Exif\0\0" + turned) + b"".join(others) + segment(0xE2, MPF) + data[2:]
    with opened(data) as image:
        image.load()
        assert not set(image.info) - {"exif", "jfif", "jfif_version", "jfif_unit", "jfif_density"}
        assert dict(image.getexif()) == {0x112: 6}


def test_a_bomb_in_a_colour_profile_is_dropped_unread() -> None:
    data = PNG[:33] + chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(50_000_000))) + PNG[33:]
    started = time.process_time()
    assert decode(data).size == (16, 16)
    assert time.process_time() - started < 0.3


def test_limits_are_above_what_honest_files_have() -> None:
    assert decode(PROGRESSIVE).size == (3000, 3000)
    assert decode(with_scans(MAX_SCANS // 2 - 10)).size == (3000, 3000)
    assert decode(JPEG[:2] + EMPTY_SEGMENT * (MAX_PARTS - 100) + JPEG[2:]).size == (16, 16)
    assert decode(PNG[:33] + chunk(b"zTXt", b"x\0\0" + MEGABYTE) * MAX_METADATA + PNG[33:]).size == (16, 16)
    assert decode(PNG[:33] + chunk(b"eXIf", tags(MAX_TAGS)) + PNG[33:]).size == (16, 16)


def test_what_follows_the_image_is_not_counted_as_scans() -> None:
    assert decode(JPEG + b"\xff\xda" * 100_000).size == (16, 16)


def test_scan_limit_shrinks_with_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocess, "MAX_SCANNED_PIXELS", 8 * 3000 * 3000)
    assert decode(PROGRESSIVE).size == (3000, 3000)
    with pytest.raises(ImageError, match=r"has more than 8 scans, too many for its 9000000 pixels"):
        decode(with_scans(4))

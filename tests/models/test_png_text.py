"""PNG files with large text or colour profiles: their pixels are read, and their EXIF orientation is applied."""

import contextlib
import io
import time
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from models.preprocess import ImageError, decode

MIB = 1024 * 1024
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)


def png(**options):
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "PNG", **options)
    return stream.getvalue()


def text(kind, content):
    info = PngImagePlugin.PngInfo()
    if kind == "iTXt":
        info.add_itxt("workflow", content, zip=True)
    else:
        info.add_text("workflow", content, zip=kind == "zTXt")
    return info


@pytest.mark.parametrize(
    "options",
    [
        *({"pnginfo": text(kind, "x" * (MIB + 1))} for kind in ("zTXt", "iTXt", "tEXt")),
        {"icc_profile": bytes(MIB + 1)},
    ],
    ids=["zTXt", "iTXt", "tEXt", "profile"],
)
def test_a_png_with_much_text_or_a_large_profile_is_decoded(options):
    assert np.array_equal(np.asarray(decode(png(**options))), PIXELS)


def text_chunk(size):
    body = b"late\0\0" + zlib.compress(bytes(size))
    return len(body).to_bytes(4, "big") + b"zTXt" + body + zlib.crc32(b"zTXt" + body).to_bytes(4, "big")


def test_text_behind_the_pixels_is_no_damage_either():
    whole = png()
    assert np.array_equal(np.asarray(decode(whole[:-12] + text_chunk(2 * MIB) + whole[-12:])), PIXELS)


def test_the_orientation_still_counts_beside_large_text():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(png(exif=exif, pnginfo=text("zTXt", "x" * (2 * MIB))))
    assert turned.size == (16, 24)


def test_a_bomb_of_texts_costs_no_time():
    whole = png()
    data = whole[:33] + text_chunk(4 * MIB) * 500 + whole[33:]
    started = time.process_time()
    with contextlib.suppress(ImageError):
        decode(data)
    assert time.process_time() - started < 1


@pytest.mark.parametrize("kind", ["zTXt", "iTXt"])
def test_a_png_with_many_small_texts_is_decoded(kind):
    info = PngImagePlugin.PngInfo()
    for number in range(40):
        if kind == "iTXt":
            info.add_itxt(f"exif:Tag{number}", "value")
        else:
            info.add_text(f"exif:Tag{number}", "value", zip=True)
    assert np.array_equal(np.asarray(decode(png(pnginfo=info))), PIXELS)

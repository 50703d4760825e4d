"""Invalid images are rejected with a one-line ImageError and no other exception."""

import io
import re
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.preprocess import MAX_BYTES, MAX_PIXELS, ImageError, preprocess, resize

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)


def encode(form, array=PICTURE, **options):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, form, **options)
    return stream.getvalue()


def oriented(form):
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a picture", 1.5
    return encode(form, exif=exif)


def png_of_size(width, height):
    """Return a PNG whose header declares width x height pixels, with the compressed data of a single row."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 + 3 * 8)))
        + chunk(b"IEND", b"")
    )


def refusal(data):
    with pytest.raises(ImageError) as caught:
        preprocess(data, 16, 16)
    message = str(caught.value)
    assert "\n" not in message and not re.search(r"0x[0-9a-f]{6}|BytesIO|<", message), message
    return message


def test_an_empty_file_is_rejected():
    assert refusal(b"") == "is empty (0 bytes); expected a JPEG, PNG or WebP image"


@pytest.mark.parametrize("data", [b"not a picture\n", b"\x00" * 100, b"%PDF-1.7 ...", b"<svg xmlns=''/>"])
def test_a_text_file_with_an_image_suffix_is_rejected(data):
    assert refusal(data) == "is not a JPEG, PNG or WebP image"


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "PPM"])
def test_an_image_of_another_format_is_rejected(form):
    assert refusal(encode(form)) == "is not a JPEG, PNG or WebP image"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_image_is_rejected(form, share):
    data = encode(form)
    assert refusal(data[: int(len(data) * share)]) in (
        "is damaged or truncated: its pixels cannot be decoded",
        "is not a JPEG, PNG or WebP image",
    )


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_an_image_without_its_last_rows_is_reported_as_truncated(form):
    data = encode(form)
    assert refusal(data[: int(len(data) * 0.8)]) == "is damaged or truncated: its pixels cannot be decoded"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (50_001, 1_000), (7_072, 7_071)])
def test_too_many_pixels_are_rejected_from_the_header_without_decoding(width, height):
    data = png_of_size(width, height)
    tracemalloc.start()
    started = time.perf_counter()
    message = refusal(data)
    seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message == f"has {width}x{height} = {width * height} pixels, above the limit of {MAX_PIXELS}"
    assert seconds < 0.5 and peak < 10**6


def test_more_pixels_than_the_limit_of_pillow_are_rejected():
    assert refusal(png_of_size(60_000, 60_000)) == f"has more pixels than the limit of {MAX_PIXELS}"


@pytest.mark.parametrize(("width", "height"), [(65, 1), (1, 65), (6500, 100)])
def test_a_too_large_aspect_ratio_is_rejected(width, height):
    data = encode("PNG", np.zeros((height, width, 3), dtype=np.uint8))
    assert refusal(data) == f"is {width}x{height}, its longer side above 64 times its shorter side"


def test_the_largest_aspect_ratio_is_accepted():
    assert preprocess(encode("PNG", np.zeros((64, 1, 3), dtype=np.uint8)), 16, 16).shape == (3, 16, 16)


def test_more_bytes_than_the_limit_are_not_even_opened():
    data = encode("PNG") + bytes(MAX_BYTES)
    assert refusal(data) == f"has {len(data)} bytes, above the limit of {MAX_BYTES}"


def test_a_crop_larger_than_the_resized_image_is_rejected():
    with pytest.raises(ImageError, match="expected resize_to >= size"):
        resize(Image.fromarray(PICTURE), 32, 16)


VALID = [
    *(encode(form) for form in ("JPEG", "PNG", "WEBP")),
    *(oriented(form) for form in ("JPEG", "PNG", "WEBP")),
    encode("JPEG", progressive=True),
    encode("PNG", np.arange(480, dtype=np.uint16).reshape(20, 24) * 100),
    encode("WEBP", lossless=True),
]


def usable_or_refused(data):
    try:
        actual = preprocess(data, 16, 16)
    except ImageError as error:
        assert "\n" not in str(error)
    else:
        assert actual.shape == (3, 16, 16) and actual.dtype == np.uint8


@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x00\x00\x00\x00WEBPVP8 "]),
)
def test_random_bytes_raise_only_image_error(data, magic):
    usable_or_refused(magic + data)


@given(
    st.sampled_from(VALID),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_a_damaged_image_is_decoded_or_raises_only_image_error(valid, changes, near_the_start):
    data = bytearray(valid)
    reach = len(data) if near_the_start < 0.5 else min(len(data), 200)
    for position, value in changes:
        data[int(position * reach)] = value
    usable_or_refused(bytes(data))


@given(st.sampled_from(VALID), st.floats(0, 1), st.binary(max_size=20))
def test_a_cut_and_spliced_image_is_decoded_or_raises_only_image_error(valid, position, spliced):
    at = int(position * len(valid))
    usable_or_refused(valid[:at] + spliced)
    usable_or_refused(valid[:at] + spliced + valid[at:])


def test_an_unreadable_png_header_is_rejected():
    data = bytearray(encode("PNG"))
    data[11] = 5  # the header chunk declares 5 bytes, with a matching checksum
    data[21:25] = struct.pack(">I", zlib.crc32(data[12:21]))
    refusal(bytes(data))

"""The gateway's cost of an image, which it parses from the image's header."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from tests.support.bad_images import chunk, data_url, hostile_images, saved
from tests.support.decoding_nginx import decoding_nginx, send

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with decoding_nginx(tmp_path_factory.mktemp("nginx")) as port:
        yield port


def cost(port: int, data: bytes) -> float:
    return float(send(port, "/pixels", data)[1].split()[0])


WIDTH, HEIGHT = 300, 200


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


PICTURES = {
    "png": (saved(NOISE, "PNG"), 1, 0.4),
    "png grey": (saved(NOISE.convert("L"), "PNG"), 1, 0.4),
    "png palette": (saved(NOISE.convert("P"), "PNG"), 1, 0.4),
    "png alpha": (saved(NOISE.convert("RGBA"), "PNG"), 1, 0.4),
    "jpeg": (saved(NOISE, "JPEG"), 0.5, 0.4),
    "jpeg grey": (saved(NOISE.convert("L"), "JPEG"), 0.5, 0.4),
    "jpeg cmyk": (saved(NOISE.convert("CMYK"), "JPEG"), 0.5, 0.4),
    "jpeg with metadata": (saved(NOISE, "JPEG", exif=b"Exif\0\0" + bytes(60_000), comment=b"x" * 90), 0.5, 0.4),
    "jpeg progressive": (saved(NOISE, "JPEG", progressive=True), 1, 0.4),
    "webp lossy": (saved(NOISE, "WEBP"), 1, 1.8),
    "webp lossless": (saved(NOISE, "WEBP", lossless=True), 1, 1.8),
    "webp alpha": (saved(NOISE.convert("RGBA"), "WEBP"), 1, 1.8),
    "webp with metadata": (saved(NOISE, "WEBP", exif=b"Exif\0\0" + bytes(100)), 1, 1.8),
    "webp animation": (saved(NOISE, "WEBP", save_all=True, append_images=[NOISE.rotate(9)]), 1, 1.8),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_cost_of_an_image_is_that_of_its_pixels_and_bytes(port: int, name: str) -> None:
    data, pixel, byte = PICTURES[name]
    assert Image.open(io.BytesIO(data)).size == (WIDTH, HEIGHT)
    assert cost(port, data) == pytest.approx(WIDTH * HEIGHT * pixel + len(data) * byte)


def test_an_image_between_other_bytes_costs_the_same(port: int) -> None:
    for data, _, _ in PICTURES.values():
        around = send(port, "/pixels?before=100&behind=50", bytes(100) + data + PICTURES["png"][0][:50])[1]
        assert float(around.split()[0]) == cost(port, data)


@pytest.mark.parametrize("name", PICTURES)
def test_an_image_as_base64_text_costs_what_its_file_costs(port: int, name: str) -> None:
    data, _, _ = PICTURES[name]
    for extra in range(3):  # the lengths of base64's padding
        file = data + bytes(extra)
        around = send(port, "/pixels?before=7&behind=5", b"QUJDREE" + data_url(file) + b"QUJDR")[1]
        assert float(around.split()[0]) == pytest.approx(cost(port, file), abs=4)


def test_a_hostile_image_as_base64_text_costs_what_its_file_costs(port: int) -> None:
    for name, data in hostile_images().items():
        if len(data) < 20_000_000:
            pixels, reads = send(port, "/pixels", data_url(data))[1].split()
            assert float(pixels) == pytest.approx(cost(port, data), abs=4) and int(reads) <= 4002, name


@pytest.mark.parametrize("side", [1, 2, 255, 256, 16383])
def test_the_size_of_an_image_is_read_exactly(port: int, side: int) -> None:
    image = Image.new("L", (side, 3))
    for form, options, pixel, byte in [
        ("PNG", {}, 1, 0.4),
        ("JPEG", {}, 0.5, 0.4),
        ("WEBP", {}, 1, 1.8),
        ("WEBP", {"lossless": True}, 1, 1.8),
    ]:
        data = saved(image, form, **options)
        assert cost(port, data) == pytest.approx(side * 3 * pixel + len(data) * byte, rel=1e-9), (form, options)


def header(width: int, height: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def test_a_file_that_pillow_rejects_undecoded_costs_nothing(port: int) -> None:
    hostile = hostile_images()
    for name in ["empty", "text", "zeros", "gif", "bmp", "tiff", "svg", "zip", "gif before png", "no pixels"]:
        assert cost(port, hostile[name]) == 0, name
    png, jpeg = hostile["wrong checksum"], saved(NOISE, "JPEG")
    for cut in [
        png[:8],
        png[:20],
        png[:33],
        jpeg[:3],
        jpeg[:100],
        jpeg[:2] + b"\xff\xd9" + jpeg[2:],
        b"RIFF\0\0\0\0WEBPVP8 ",
    ]:
        assert cost(port, cut) == 0
        with pytest.raises(OSError), Image.open(io.BytesIO(cut), formats=("PNG", "JPEG", "WEBP")) as image:
            image.load()


def test_an_endless_header_has_the_largest_cost_and_is_not_read_to_its_end(port: int) -> None:
    png, jpeg = saved(NOISE, "PNG"), saved(NOISE, "JPEG")
    for data in [
        jpeg[:2] + b"\xff\xfe\0\2" * 30_000 + jpeg[2:],
        jpeg[:2] + b"\xff\xfe\0\0" * 30_000 + jpeg[2:],
        jpeg[:2] + b"\xff" * 30_000 + jpeg[2:],
        b"\xff\xd8\xff" + bytes(30_000) + jpeg[2:],
        png[:33] + chunk(b"prVt", b"") * 30_000 + png[33:],
        png[:33] + bytes(600_000) + png[33:],
    ]:
        pixels, reads = send(port, "/pixels", data)[1].split()
        assert float(pixels) == 25e6
        assert int(reads) <= 4002


def test_of_two_sizes_the_larger_counts(port: int) -> None:
    """Pillow uses the last size before a PNG's data, also of an animation frame; and a JPEG's last frame header."""
    solid = Image.new("RGB", (WIDTH, HEIGHT))
    png, jpeg = saved(solid, "PNG"), saved(solid, "JPEG")
    frame = jpeg.index(b"\xff\xc0")
    length = 2 + int.from_bytes(jpeg[frame + 2 : frame + 4], "big")
    small = bytearray(jpeg[frame : frame + length])
    small[5:9] = bytes([0, 1, 0, 1])
    frame_data = chunk(b"fdAT", bytes(4) + zlib.compress(bytes(10)))
    for data in [
        png[:8] + header(1, 1) + png[8:],
        png[:33] + header(1, 1) + png[33:],
        png[:33] + frame_data + header(1, 1) + png[33:],
        jpeg[:frame] + small + jpeg[frame:],
        jpeg[: frame + length] + small + jpeg[frame + length :],
    ]:
        assert cost(port, data) >= WIDTH * HEIGHT / 4


def test_a_declared_canvas_counts_although_no_pixel_follows(port: int) -> None:
    assert cost(port, hostile_images()["canvas"]) == 25e6
    assert cost(port, hostile_images()["bomb by header"]) == 25e6

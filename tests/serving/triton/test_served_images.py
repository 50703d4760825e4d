"""Valid and invalid images of every kind through the client and the real server."""

from __future__ import annotations

import io
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, SIZE, TOP_K, Release, encode, picture
from PIL import Image

from models.preprocess import MAX_BYTES, preprocess
from serving.client.sync_client import Client, read_image
from serving.server.triton_server import TritonServer
from serving.shared.errors import InputError
from serving.transport.sync_transport import RequestRejected, Transport
from tests.support.bad_files import BAD, PIXELS, header_of_100_megapixels, saved
from tests.support.bad_images import data_url, solid_webp


def rotated_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(PIXELS), "JPEG", quality=100, subsampling=0, exif=exif)


GOOD = {
    "rgb.png": encode(PIXELS),
    "rgb.webp": saved(Image.fromarray(PIXELS), "WEBP", lossless=True),
    "grey.png": encode(PIXELS[..., 0]),
    "grey16.png": saved(Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257), "PNG"),
    "cmyk.jpg": saved(Image.fromarray(PIXELS).convert("CMYK"), "JPEG", quality=100),
    "palette.png": saved(Image.fromarray(PIXELS).quantize(16), "PNG"),
    "alpha.png": saved(Image.fromarray(PIXELS).convert("RGBA"), "PNG"),
    "rotated.jpg": rotated_by_exif(),
    "larger.jpg": saved(Image.fromarray(PIXELS).resize((40, 30)), "JPEG"),
}


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", GOOD)
def test_served_image_is_preprocessed_as_in_training(
    server: TritonServer, release: Release, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(GOOD[name])
    expected = release.probabilities([GOOD[name]], np.zeros(len(CLASSES)))[0]
    best = np.argsort(-expected)[:TOP_K]
    with Client(server.http_url) as client:
        answer = client.predict([tmp_path / name], "balanced")[0]
    assert list(answer.indexes) == best.tolist()
    np.testing.assert_allclose(answer.probabilities, expected[best], rtol=1e-4, atol=1e-6)


def test_preprocess_handles_color_grey_depth_and_rotation() -> None:
    color = preprocess(GOOD["rgb.png"], SIZE, SIZE)
    grey = preprocess(GOOD["grey.png"], SIZE, SIZE)
    assert (preprocess(GOOD["rgb.webp"], SIZE, SIZE) == color).all()
    assert (grey == PIXELS[..., 0]).all()
    assert (preprocess(GOOD["grey16.png"], SIZE, SIZE) == grey).all()
    rotated = preprocess(GOOD["rotated.jpg"], SIZE, SIZE).astype(int)
    upright = np.rot90(color.astype(int), -1, axes=(1, 2))
    assert np.abs(rotated - upright).mean() < 5 < np.abs(rotated - color).mean()


@pytest.mark.parametrize("name", BAD)
def test_an_invalid_file_is_named_with_its_fault_in_one_line(tmp_path: Path, name: str) -> None:
    data, fault = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as caught:
        read_image(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", BAD)
def test_the_server_rejects_what_the_client_rejects(server: TritonServer, name: str) -> None:
    transport = Transport(server.grpc_url, timeout=30)
    try:
        with pytest.raises(RequestRejected, match=r"image (is|has) "):
            transport.infer("classifier", {"image": np.array([[BAD[name][0]]], dtype=np.object_)}, {"index": 0})
    finally:
        transport.close()


@pytest.mark.end_to_end
@pytest.mark.parametrize("name", GOOD)
def test_an_image_as_base64_text_gets_the_prediction_of_its_file(server: TritonServer, name: str) -> None:
    transport = Transport(server.grpc_url, timeout=30)
    try:
        for media_type in (b"jpeg", b"png", b"webp"):  # the format is detected from the bytes, not from the media type
            text = data_url(GOOD[name]).replace(b"png", media_type, 1)
            images = np.array([[GOOD[name]], [text]], dtype=np.object_)
            answer = transport.infer("classifier", {"image": images}, {"index": 0, "probability": 0})[0]
            assert answer["index"][0].tolist() == answer["index"][1].tolist()
            assert answer["probability"][0].tolist() == answer["probability"][1].tolist()
    finally:
        transport.close()


@pytest.mark.end_to_end
@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (data_url(b"")[:-1], "is not a JPEG, PNG or WebP image"),
        (data_url(b""), "is empty"),
        (data_url(picture(1)) + b"\n", "is not base64"),
        (data_url(picture(1))[:60] + b"====", "is not base64"),
        (data_url(b"ab").rstrip(b"="), "is not base64"),
        (data_url(b"a letter"), "is not a JPEG, PNG or WebP image"),
        (data_url(data_url(picture(1))), "is not a JPEG, PNG or WebP image"),
        (data_url(header_of_100_megapixels()), "has 10000x10000 = 100000000 pixels"),
        (data_url(solid_webp(7000)), "has 49000000 pixels to decode, above the limit of 16000000"),
        (data_url(bytes(MAX_BYTES + 3)), f"has more than {MAX_BYTES} bytes"),
    ],
)  # fmt: skip
def test_invalid_base64_text_is_rejected_with_its_fault(server: TritonServer, text: bytes, fault: str) -> None:
    with pytest.raises(RequestRejected, match=re.escape(f"image {fault}")):
        infer(server.grpc_url, text)


def infer(url: str, *images: bytes) -> int:
    """Send images; return the number of predictions. Raises RequestRejected."""
    transport = Transport(url, timeout=60)
    try:
        inputs = {"image": np.array([[image] for image in images], dtype=np.object_)}
        return len(transport.infer("classifier", inputs, {"index": 0})[0]["index"])
    finally:
        transport.close()


@pytest.mark.end_to_end
def test_an_image_above_16_million_pixels_is_rejected_before_it_is_decoded(server: TritonServer) -> None:
    image = solid_webp(7000)
    assert Image.open(io.BytesIO(image)).size == (7000, 7000) and len(image) <= 36
    started = time.monotonic()
    for _ in range(8):
        with pytest.raises(
            RequestRejected, match="image has 49000000 pixels to decode, above the limit of 16000000; make it smaller"
        ):
            infer(server.grpc_url, image, image, image, image)
    assert time.monotonic() - started < 0.6  # a single one took that long before the fix


@pytest.mark.end_to_end
def test_a_request_above_25_million_pixels_is_rejected(server: TritonServer) -> None:
    image = saved(Image.new("L", (3500, 3500)), "PNG", compress_level=1)
    with pytest.raises(
        RequestRejected,
        match="row 2: image brings the request to 36750000 pixels, above the limit of 25000000; send fewer images",
    ):
        infer(server.grpc_url, image, image, image)
    assert infer(server.grpc_url, image, image) == 2


@pytest.mark.end_to_end
def test_a_large_jpeg_counts_with_its_reduced_pixels(server: TritonServer) -> None:
    image = Image.new("L", (7000, 7000), 99)
    photo, progressive = saved(image, "JPEG"), saved(image, "JPEG", progressive=True)
    assert infer(server.grpc_url, photo, photo) == 2
    with pytest.raises(RequestRejected, match="row 2: image brings the request to 36750000 pixels"):
        infer(server.grpc_url, photo, photo, photo)
    with pytest.raises(RequestRejected, match="image has 24500000 pixels to decode, above the limit of 16000000"):
        infer(server.grpc_url, progressive)


@pytest.mark.end_to_end
def test_client_splits_images_above_the_limit_of_a_request(server: TritonServer) -> None:
    images = [saved(Image.new("L", (3500, 3500), level), "PNG", compress_level=1) for level in (0, 100, 200)]
    with Client(server.http_url) as client:
        together, alone = client.predict(images), [client.predict([image])[0] for image in images]
    assert [answer.indexes for answer in together] == [answer.indexes for answer in alone]


def test_missing_file_folder_pipe_and_oversized_file_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "large.png").open("wb") as stream:
        stream.truncate(MAX_BYTES + 1)
    for path, fault in (
        (tmp_path / "missing.png", "No such file or directory"),
        (tmp_path, "is a folder"),
        (tmp_path / "pipe.png", "is not a regular file"),
        (tmp_path / "large.png", f"has {MAX_BYTES + 1} bytes, above the limit"),
        ("nul\0byte.png", "Invalid argument"),
    ):
        with pytest.raises(InputError, match=fault):
            read_image(path)


def test_bytes_are_named_by_their_index() -> None:
    with pytest.raises(InputError, match="image 7: is empty"):
        read_image(b"", 7)

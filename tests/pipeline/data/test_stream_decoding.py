"""Fast decoding: within one grey level of the server's pixels for every kind of image; rejects the same images."""

from __future__ import annotations

import contextlib
import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
import torchvision.io
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from models.preprocess import ImageError, preprocess
from pipeline.data.stream_decoding import (
    DecodingStream,
    decode_exact,
    decode_fast,
    decode_nvjpeg,
    decode_unless_nvjpeg,
    evaluation_view,
)
from tests.support.making import encode, params, picture

SMALL = params({"image.size": 56, "image.resize_to": 64}).image
SAME = params({"image.size": 64, "image.resize_to": 64}).image


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a smooth picture: decoders differ on noise."""
    small = Image.fromarray(picture(seed, (max(2, height // 24), max(2, width // 24))))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def oriented(image: Image.Image, orientation: int, form: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(image, form, exif=exif)


def two_frames(form: str) -> bytes:
    stream = io.BytesIO()
    photo(90, 70).save(stream, form, save_all=True, append_images=[photo(90, 70, seed=9)])
    return stream.getvalue()


WIDE = np.arange(90 * 70, dtype=np.uint16).reshape(70, 90) * 10
KINDS = {
    "jpeg": encode(photo(200, 150), "JPEG", quality=90),
    "portrait": encode(photo(97, 211), "JPEG"),
    "without subsampled colours": encode(photo(200, 150), "JPEG", subsampling=0),
    "progressive": encode(photo(200, 150), "JPEG", progressive=True),
    "grey": encode(photo(200, 150).convert("L"), "JPEG"),
    "cmyk": encode(photo(200, 150).convert("CMYK"), "JPEG"),
    "png": encode(photo(200, 150)),
    "palette with alpha": encode(photo(200, 150).convert("RGBA").quantize(16)),
    "16-bit": encode(Image.fromarray(WIDE)),
    "animated webp": two_frames("WEBP"),
    **{f"orientation {turn}": oriented(photo(200, 150), turn, "JPEG") for turn in range(1, 9)},
    "enlarged": encode(photo(30, 25), "JPEG"),
}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_an_image_of_any_kind_equals_the_servers_within_one_grey_level(kind, interpolation):
    image = SMALL.model_copy(update={"interpolation": interpolation})
    expected, actual = decode_exact(KINDS[kind], image), decode_fast(KINDS[kind], image)
    assert actual.shape == (3, 56, 56) and actual.dtype == torch.uint8
    apart = (actual.int() - expected.int()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.02


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("size", [(64, 64), (64, 91), (80, 64)])
def test_an_image_that_is_not_resized_is_bit_identical_to_the_servers(form, size):
    data = encode(photo(*size), form)
    assert torch.equal(decode_fast(data, SAME), decode_exact(data, SAME))


def test_a_very_large_jpeg_is_decoded_at_a_fraction_with_nearly_equal_pixels(monkeypatch):
    data, sizes = encode(photo(1200, 900), "JPEG", quality=95), []

    def draft(image, mode, size):
        mode, box = whole(image, mode, size)
        sizes.append(box[2:])
        return mode, box

    whole = JpegImageFile.draft
    monkeypatch.setattr(JpegImageFile, "draft", draft)
    actual = decode_fast(data, SMALL)
    assert sizes == [(600, 450)], "half of each side, still more than four times the 64 that are needed"
    assert torch.equal(actual, decode_exact(data, SMALL))
    apart = (actual.int() - torch.from_numpy(preprocess(data, SMALL.size, SMALL.resize_to, room=0)).int()).abs().float()
    assert apart.mean() < 0.5 and apart.max() <= 4


@pytest.mark.parametrize("kind", ["jpeg", "grey", "progressive"])
def test_jpegs_are_decoded_by_pillow_if_torchvision_has_no_decoder(kind, monkeypatch):
    expected = decode_fast(KINDS[kind], SMALL)
    monkeypatch.delattr(torchvision.io, "decode_jpeg")
    assert torch.equal(decode_fast(KINDS[kind], SMALL), expected)
    with pytest.raises(RuntimeError, match="no decoder of JPEGs"):
        decode_nvjpeg([KINDS[kind]], torch.device("cuda"))


BAD = {
    "empty": b"",
    "text": b"not a picture",
    "animated gif": None,
    "truncated": encode(photo(200, 150), "JPEG")[:2000],
    "half a png": encode(photo(200, 150))[:2000],
}


@pytest.mark.parametrize("kind", list(BAD))
def test_an_image_that_the_server_rejects_is_rejected_with_the_same_message(kind):
    data = two_frames("GIF") if BAD[kind] is None else BAD[kind]
    with pytest.raises(ImageError) as expected:
        decode_exact(data, SMALL)
    with pytest.raises(ImageError) as actual:
        decode_fast(data, SMALL)
    assert str(actual.value) == str(expected.value)


def jpeg_of_size(width: int, height: int) -> bytes:
    """Return a small JPEG whose header declares other sides."""
    data = bytearray(encode(photo(48, 48), "JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def png_of_size(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    body = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + body + b"\x00\x00\x00\x00IDAT5\xaf\x06\x1e"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("decode", [decode_fast, decode_unless_nvjpeg])
@pytest.mark.parametrize("made", [jpeg_of_size, png_of_size])
def test_900_million_pixels_are_rejected_before_decoding(made, decode):
    data = made(30_000, 30_000)
    tracemalloc.start()
    with pytest.raises(ImageError, match=r"more pixels than the limit|= 900000000 pixels, above the limit"):
        decode(data, SMALL)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


def test_nvjpeg_decodes_only_plain_jpegs_and_the_cpu_all_others():
    for kind in ("jpeg", "portrait", "progressive", "grey", "orientation 1"):
        assert decode_unless_nvjpeg(KINDS[kind], SMALL) is None
    for kind in ("png", "cmyk", "orientation 6", "16-bit"):
        assert torch.equal(decode_unless_nvjpeg(KINDS[kind], SMALL), decode_fast(KINDS[kind], SMALL))


def test_nvjpeg_decodes_on_an_empty_stream_apart_from_the_steps(monkeypatch):
    done = []

    class Stream:
        device = torch.device("cuda")

        def __init__(self, name="decoding"):
            self.name = name

        def synchronize(self):
            done.append(f"{self.name} is empty")

        def wait_stream(self, other):
            done.append(f"{self.name} waits for {other.name}")

    class Batch:
        def record_stream(self, stream):
            done.append(f"batch is used by {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext(done.append(f"on {stream.name}")))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("steps"))
    decoding = DecodingStream(torch.device("cuda"))
    decoding.run(lambda: done.append("decodes") or Batch())
    assert done == [
        "decoding is empty", "on decoding", "decodes", "steps waits for decoding", "batch is used by steps",
    ]  # fmt: skip
    assert DecodingStream(torch.device("cpu")).run(lambda: "as it is") == "as it is"


@pytest.mark.gpu
def test_nvjpeg_equals_the_cpu_decoder_except_for_rounding():
    device = torch.device("cuda")
    kinds = ("jpeg", "portrait", "grey")
    decoded = decode_nvjpeg([KINDS[kind] for kind in kinds], device)
    for original, kind in zip(decoded, kinds, strict=True):
        pixels = evaluation_view(original, SMALL).cpu()
        apart = (pixels.int() - decode_fast(KINDS[kind], SMALL).int()).abs().float()
        assert apart.mean() < 2

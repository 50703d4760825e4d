"""Resized crops of the full-size photograph, against torchvision's RandomResizedCrop on the decoded file."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as tv
from torchvision.transforms import v2

from pipeline import split
from pipeline.augment import apply_views, draw_views
from pipeline.augment.crops import CHANCES, boxes_of
from pipeline.data.dataset import Images, training_images
from pipeline.data.stream import ImageStream
from pipeline.data.stream_decoding import decode_original, enough_pixels
from pipeline.params import AugmentParams, ImageParams, StreamParams
from pipeline.shared.errors import DataError
from pipeline.shared.host_memory import free_bytes
from tests.support.making import data_params, encode, write
from tests.support.small_training import CPU

pytestmark = pytest.mark.slow

IMAGE = ImageParams(size=224, resize_to=256, mean=[0.5] * 3, std=[0.25] * 3)
CROPS = AugmentParams(crop="resized", crop_padding=0, flip=True, cutout=0)
MANY = 300  # views per side of the comparison


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return a photograph whose red and green are ramps that identify a crop's position; blue has a 1/f spectrum."""
    random = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    texture = np.fft.irfft2(np.fft.rfft2(random.standard_normal((height, width))) / frequency, (height, width))
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([across, down, 128 + 50 * texture / texture.std()], -1)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def measures(views: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Measure views uint8 [N,3,S,S]: share of the image's area, output pixels per source pixel, gradient energy."""
    values, size = views.double(), views.shape[-1]
    middle = torch.arange(size, dtype=torch.float64) - (size - 1) / 2

    def extent(ramp: torch.Tensor) -> torch.Tensor:  # [N,S] → share of the side, by least squares
        return (ramp @ middle).abs() / (middle @ middle) * size / 255

    wide, tall = extent(values[:, 0].mean(1)), extent(values[:, 1].mean(2))
    blue = values[:, 2]
    energy = blue.diff(dim=1).square().mean((1, 2)), blue.diff(dim=2).square().mean((1, 2))
    return torch.stack([wide * tall, size / (wide * width), size / (tall * height), *energy], 1)


def assert_same_distribution(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that mean and variance of each measure agree within five standard errors of a two-sample difference."""
    spread = [(sample - sample.mean(0)).square() for sample in (actual, expected)]
    for one, other in ((actual, expected), spread):
        error = (one.var(0) / len(one) + other.var(0) / len(other)).sqrt()
        assert ((one.mean(0) - other.mean(0)).abs() < 5 * error).all(), (one.mean(0), other.mean(0), error)


def streaming(root, image=IMAGE, **stream):
    """Return params for a folder of photographs, split into root/split."""
    made = data_params(root / "source", validation_per_class=0, test_per_class=1)
    made = made.model_copy(update={"image": image, "stream": StreamParams(workers=2, **stream)})
    if not (root / "split").is_dir():
        split.run(made, root / "split")
    return made


def images_of(root, augment=CROPS, views=1, free_memory=free_bytes, **keys):
    params = streaming(root, **keys)
    return training_images(params, CPU, root / "split", augment=augment, views=views, free_memory=free_memory)[0]


def folder_of(root, *pictures: bytes) -> None:
    """Write two classes with the same pictures, one of each held out."""
    for name in ("a", "b"):
        for number, data in enumerate([pictures[0], *pictures]):
            write(root / f"source/{name}/{number}.png", data + (name + str(number)).encode())


def drawn(count: int, views: int = 1, augment=CROPS):
    return draw_views(count, 224, 224, views, augment, torch.Generator().manual_seed(0))


def views_of(images, count: int, views: int) -> torch.Tensor:
    """Return views of the first image with a stage's random draws: uint8 [views * count,3,size,size]."""
    draws = drawn(count, views)
    indices = torch.zeros(count, dtype=torch.int64)
    return apply_views(images.pixels(indices, draws), draws, CROPS).flatten(0, 1)


@pytest.mark.parametrize(("views", "mode"), [(1, "off"), (3, "on")], ids=["teacher, held", "student, streamed"])
@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (640, 480), (300, 300)])
def test_views_have_the_distribution_of_torchvision_on_the_original(width, height, views, mode, tmp_path):
    picture = photograph(width, height)
    folder_of(tmp_path, encode(picture))
    actual = views_of(images_of(tmp_path, views=views, mode=mode), MANY // views, views)
    torch.manual_seed(1)
    reference = v2.RandomResizedCrop(224, antialias=True)
    expected = torch.stack([tv.pil_to_tensor(reference(picture)) for _ in range(MANY)])
    assert_same_distribution(measures(actual, width, height), measures(expected, width, height))


@pytest.mark.parametrize("decode", ["exact", "fast"])
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_view_equals_torchvisions_crop_of_the_decoded_file_at_the_drawn_box(form, decode, tmp_path):
    data = encode(photograph(500, 375), form)
    folder_of(tmp_path, data)
    images, draws = images_of(tmp_path, mode="on", decode=decode), drawn(40)
    actual = apply_views(images.pixels(torch.zeros(40, dtype=torch.int64), draws), draws, CROPS)[0].int()
    picture, table = Image.open(io.BytesIO(data)).convert("RGB"), draws.tables[0][0]
    boxes = boxes_of(table[:, :CHANCES], torch.tensor(375), torch.tensor(500), CROPS.crop_scale)
    for view, box, flipped in zip(actual, boxes.tolist(), table[:, CHANCES].bool().tolist(), strict=True):
        expected = tv.pil_to_tensor(tv.resized_crop(picture, *box, size=[224, 224])).int()
        apart = (view - (expected.flip(2) if flipped else expected)).abs()
        assert apart.max() <= (1 if decode == "fast" else 0) and (apart > 0).float().mean() < 0.05


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize(("width", "height"), [(1600, 1200), (2400, 3200)])
def test_a_larger_photograph_is_reduced_to_the_required_pixels_and_keeps_its_gradients(width, height, form):
    # With chroma subsampling a JPEG is sharper in blue when decoded at half size.
    colours = {"subsampling": 0} if form == "JPEG" else {}
    data = encode(photograph(width, height), form, **colours)
    picture, most = Image.open(io.BytesIO(data)), enough_pixels(IMAGE, CROPS.crop_scale)
    small = decode_original(data, most)
    assert 0.99 * most < small.shape[1] * small.shape[2] <= most
    boxes = boxes_of(drawn(60).tables[0][0][:, :CHANCES], torch.tensor(height), torch.tensor(width), [0.08, 1.0])
    scale, views, expected = small.shape[1] / height, [], []
    for box in boxes.tolist():
        expected.append(tv.pil_to_tensor(tv.resized_crop(picture, *box, size=[224, 224])))
        top, left, tall, wide = (round(side * scale) for side in box)
        views.append(tv.resized_crop(small, top, left, tall, wide, [224, 224], antialias=True))
        assert min(tall, wide) >= 223
    actual, expected = (measures(torch.stack(part), width, height) for part in (views, expected))
    assert ((actual / expected).mean(0) - 1).abs().max() < 0.03


def test_a_photograph_with_exif_rotation_is_upright_at_any_size():
    for size in ((300, 200), (1600, 1200)):
        picture, exif = photograph(*size), Image.Exif()
        exif[0x0112] = 6  # a quarter turn clockwise
        actual = decode_original(encode(picture, "JPEG", exif=exif), enough_pixels(IMAGE, CROPS.crop_scale))
        assert actual.shape[1] > actual.shape[2]
        # The ramp from left to right now runs from top to bottom.
        assert actual[0, -1].float().mean() - actual[0, 0].float().mean() > 200


def test_the_mode_limits_cached_originals_and_changes_no_view(tmp_path):
    pictures = [encode(photograph(120, 90, seed)) for seed in range(3)]
    folder_of(tmp_path, *pictures)
    one = 120 * 90 * 3
    indices, draws = torch.arange(6), drawn(6)
    # Half of the free memory holds two images.
    actual = {mode: images_of(tmp_path, free_memory=lambda: 5 * one, mode=mode) for mode in ("on", "off", "auto")}
    expected = actual["on"].pixels(indices, draws)
    assert all(torch.equal(images.pixels(indices, draws), expected) for images in actual.values())
    for path in (tmp_path / "source").glob("*/*"):
        path.unlink()
    with pytest.raises(DataError):
        actual["on"].pixels(indices[:1], draws.rows(0, 1))
    assert torch.equal(actual["off"].pixels(indices, draws), expected)
    assert len(actual["auto"].originals) == 2


def test_squares_of_the_network_size_are_cropped_on_the_device_bit_identical_to_a_stream(tmp_path):
    small = AugmentParams(crop="resized", crop_padding=0, flip=True, cutout=0, contrast_policy="simaugment")
    image = IMAGE.model_copy(update={"size": 32, "resize_to": 36})
    folder_of(tmp_path, *(encode(photograph(32, 32, seed)) for seed in range(4)))
    keys = {"image": image, "views": 3, "augment": small, "decode": "exact"}
    held, stream = images_of(tmp_path, mode="off", **keys), images_of(tmp_path, mode="on", **keys)
    assert isinstance(held, Images) and isinstance(stream, ImageStream)
    draws = draw_views(8, 32, 32, 3, small, torch.Generator().manual_seed(0))
    cut = apply_views(held.pixels(torch.arange(8)), draws, small)
    assert torch.equal(apply_views(stream.pixels(torch.arange(8), draws), draws, small), cut)
    write(tmp_path / "source/a/1.png", encode(photograph(33, 32)))
    assert isinstance(images_of(tmp_path, mode="off", **keys), ImageStream), "one that is no such square"


def test_a_padded_view_beside_resized_ones_is_the_test_view(tmp_path):
    both = AugmentParams(crop_padding=4, flip=True, cutout=0, contrast_policy="simaugment", jitter=0.0)
    pad = both.model_copy(update={"contrast_policy": "same"})
    picture = photograph(500, 375)
    folder_of(tmp_path, encode(picture))
    plain, stream = (images_of(tmp_path, augment, 3, mode="on", decode="fast") for augment in (pad, both))
    draws = drawn(30, 3, both)
    indices = torch.zeros(30, dtype=torch.int64)
    assert plain.pixels(indices, draws).shape == (30, 3, 224, 224)
    actual = apply_views(stream.pixels(indices, draws), draws, both)
    assert torch.equal(actual[0], apply_views(plain.pixels(indices), draws, both)[0])
    shares = measures(actual[1:].flatten(0, 1), 500, 375)[:, 0]
    assert shares.min() < 0.15 and shares.max() > 0.75


def test_images_for_nvjpeg_are_cropped_at_the_same_boxes(tmp_path):
    # Without a GPU its decoder fails, and the CPU decoder is used.
    data = encode(photograph(200, 150), "JPEG")
    folder_of(tmp_path, data)
    stream, draws = images_of(tmp_path, mode="on", views=3), drawn(4, 3)
    indices = torch.tensor([1, 0, 1, 0])
    expected = stream.pixels(indices, draws)
    half = expected.clone()
    half[[0, 2]] = 0
    actual = stream.decode_on_gpu(half, [(0, 1, stream.encoded(1)), (2, 1, stream.encoded(1))], draws)
    assert torch.equal(actual, expected)

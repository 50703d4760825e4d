"""Every operation of the augmentation policies against Pillow, image by image: equal, or within a stated tolerance."""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from pipeline.augment.affine import fixed_matrix, resample
from pipeline.augment.crops import resized_crop
from pipeline.augment.lookup import histogram, solarize_add
from pipeline.augment.operations import CODE, apply_slot

COUNT = 40
FILL = (124, 116, 104)
SIZES = st.tuples(st.integers(3, 24), st.integers(3, 24))
SEEDS = st.integers(0, 10_000)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(count, height, width, generator):
    """Return noise with a different range per channel, including constant channels and channels with few values."""
    low = torch.randint(0, 200, (count, 3, 1, 1), generator=generator)
    spread = torch.randint(1, 256, (count, 3, 1, 1), generator=generator)
    noise = torch.rand(count, 3, height, width, generator=generator)
    return (low + (noise * spread).long()).clamp(max=255).to(torch.uint8)


def pillow(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def one_by_one(change, images, values):
    return torch.stack(
        [tensor(change(pillow(image), value)) for image, value in zip(images, values.tolist(), strict=True)]
    )


def batched(name, images, values):
    """Apply an operation as the policies do, to the batch with a different argument per image."""
    codes = torch.full((len(images),), CODE[name])
    return apply_slot(images.clone(), codes, values.float(), None, possible=(name,), fill=FILL, method="nearest")


def levels_apart(one, other):
    return (one.int() - other.int()).abs()


def uniform(low, high):
    return lambda generator: low + (high - low) * torch.rand(COUNT, generator=generator)


def integers(low, high):
    return lambda generator: torch.randint(low, high + 1, (COUNT,), generator=generator).float()


ANY = uniform(0, 1)
POINTWISE = {
    "autocontrast": (lambda image, _: ImageOps.autocontrast(image), ANY),
    "invert": (lambda image, _: ImageOps.invert(image), ANY),
    "equalize": (lambda image, _: ImageOps.equalize(image), ANY),
    "grey": (lambda image, _: image.convert("L").convert("RGB"), ANY),
    "solarize": (ImageOps.solarize, uniform(0, 256)),
    "posterize": (lambda image, bits: ImageOps.posterize(image, int(bits)), integers(1, 8)),
    "brightness": (lambda image, factor: ImageEnhance.Brightness(image).enhance(factor), uniform(0, 2)),
    "contrast": (lambda image, factor: ImageEnhance.Contrast(image).enhance(factor), uniform(0, 2)),
    "color": (lambda image, factor: ImageEnhance.Color(image).enhance(factor), uniform(0, 2)),
    "sharpness": (lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor), uniform(0, 2)),
}


@pytest.mark.parametrize("name", POINTWISE)
@given(SIZES, SEEDS)
@settings(max_examples=12, deadline=None)
def test_a_lookup_operation_is_bit_identical_to_pillow(name, size, seed):
    change, arguments = POINTWISE[name]
    generator = seeded(seed)
    images, values = pictures(COUNT, *size, generator), arguments(generator)
    assert torch.equal(batched(name, images, values), one_by_one(change, images, values))


@pytest.mark.parametrize("name", ["autocontrast", "equalize", "contrast", "posterize", "sharpness", "color"])
def test_flat_black_and_white_images_are_treated_as_pillow_does(name):
    change, arguments = POINTWISE[name]
    levels = torch.linspace(0, 255, COUNT).to(torch.uint8)
    images = levels[:, None, None, None].expand(-1, 3, 6, 6).contiguous()
    values = arguments(seeded())
    assert torch.equal(batched(name, images, values), one_by_one(change, images, values))


def test_the_extremes_of_solarize_and_posterize_change_nothing_or_keep_nothing():
    images = pictures(4, 5, 5, seeded())
    assert torch.equal(batched("solarize", images, torch.full((4,), 256.0)), images)
    assert torch.equal(batched("solarize", images, torch.zeros(4)), 255 - images)
    assert torch.equal(batched("posterize", images, torch.full((4,), 8.0)), images)
    assert not batched("posterize", images, torch.zeros(4)).any()


@given(SEEDS)
@settings(max_examples=10, deadline=None)
def test_solarize_add_raises_the_values_below_128_and_no_other(seed):
    generator = seeded(seed)
    images, values = pictures(COUNT, 8, 8, generator), integers(0, 110)(generator)

    def change(image, addition):
        return image.point([min(level + int(addition), 255) if level < 128 else level for level in range(256)] * 3)

    assert torch.equal(batched("solarize_add", images, values), one_by_one(change, images, values))
    assert solarize_add(images, values).dtype == torch.uint8


@pytest.mark.parametrize(
    ("name", "change", "apart"),
    [
        ("invert", lambda image, _: tv.invert(image), 0),
        ("equalize", lambda image, _: tv.equalize(image), 0),
        ("solarize", lambda image, threshold: tv.solarize(image, threshold), 0),
        ("posterize", lambda image, bits: tv.posterize(image, int(bits)), 0),
        ("autocontrast", lambda image, _: tv.autocontrast(image), 1),  # torchvision's float32 against double precision
        ("brightness", tv.adjust_brightness, 1),  # float32 in another order
        ("contrast", tv.adjust_contrast, 2),  # mean rounded here and in Pillow, not in torchvision; factors up to 2
        ("color", tv.adjust_saturation, 2),  # the luminance is rounded here and in Pillow, truncated in torchvision
        ("sharpness", tv.adjust_sharpness, 1),
        ("grey", lambda image, _: tv.rgb_to_grayscale(image, 3), 1),
    ],
)
def test_a_lookup_operation_equals_torchvision_except_for_rounding(name, change, apart):
    generator = seeded(4)
    images, values = pictures(COUNT, 16, 16, generator), POINTWISE[name][1](generator)
    expected = torch.stack([change(image, value) for image, value in zip(images, values.tolist(), strict=True)])
    assert levels_apart(batched(name, images, values), expected).max() <= apart


@given(SIZES, SEEDS)
@settings(max_examples=15, deadline=None)
def test_a_blur_equals_pillow_within_one_grey_level(size, seed):
    # Tolerance of one level: Pillow's fixed-point weights and float32 round a tie differently.
    generator = seeded(seed)
    images, radius = pictures(COUNT, *size, generator), uniform(0.1, 2.0)(generator)
    expected = one_by_one(lambda image, value: image.filter(ImageFilter.GaussianBlur(value)), images, radius)
    apart = levels_apart(batched("blur", images, radius), expected)
    assert apart.max() <= 1 and apart.float().mean() < 0.005


def transformed(name, image, value, resampling):
    if name == "rotate":
        return image.rotate(value, resampling, fillcolor=FILL)
    matrix = {
        "shear_x": (1, value, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, value, 1, 0),
        "translate_x": (1, 0, value, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, value),
    }[name]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resampling, fillcolor=FILL)


LARGEST = {"shear_x": 0.3, "shear_y": 0.3, "translate_x": 15, "translate_y": 15, "rotate": 30}


def moved(name, size, seed, method):
    """Return the geometrically transformed batch and Pillow's result, with an argument per image."""
    generator = seeded(seed)
    images = pictures(COUNT, *size, generator)
    values = LARGEST[name] * (2 * torch.rand(COUNT, dtype=torch.float64, generator=generator) - 1)
    resampling = Image.Resampling[method.upper()]
    actual = resample(images, fixed_matrix(name, values, *size), fill=FILL, method=method)
    return actual, one_by_one(lambda image, value: transformed(name, image, value, resampling), images, values)


@pytest.mark.parametrize("name", LARGEST)
@given(SIZES, SEEDS)
@settings(max_examples=12, deadline=None)
def test_a_nearest_geometric_operation_is_bit_identical_to_pillow(name, size, seed):
    actual, expected = moved(name, size, seed, "nearest")
    # Pillow translates in double precision: a position within 2^-17 of a pixel's edge may round either way.
    assert (actual != expected).float().mean() <= (0.02 if name.startswith("translate") else 0)


@pytest.mark.parametrize("method", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", LARGEST)
def test_an_interpolated_geometric_operation_equals_pillow_within_one_grey_level(name, method):
    for seed, size in enumerate([(32, 32), (17, 23)]):
        actual, expected = moved(name, size, seed, method)
        apart = levels_apart(actual, expected)
        # Positions are rounded to 2^-16 here: a thousandth of the pixels may fall on the other side of the edge.
        assert (apart > 1).float().mean() < 1e-3 and (apart > 0).float().mean() < 0.01


def test_a_matrix_exists_for_geometric_operations_only():
    with pytest.raises(ValueError, match="'invert' is not geometric"):
        fixed_matrix("invert", torch.zeros(1), 4, 4)


def test_each_operation_of_a_slot_changes_only_its_images():
    names = ["identity", "invert", "rotate", "equalize", "sharpness", "translate_x", "brightness", "color"]
    count = len(names) * 5
    images = pictures(count, 12, 12, seeded())
    code = torch.tensor([CODE[name] for name in names]).repeat(5)
    value = torch.full((count,), 1.6)
    matrices = fixed_matrix("rotate", value.double(), 12, 12)
    shifts = fixed_matrix("translate_x", value.double(), 12, 12)
    matrices = torch.where((code == CODE["translate_x"])[:, None], shifts, matrices)
    options = {"possible": tuple(names[1:]), "fill": FILL, "method": "bilinear"}
    together = apply_slot(images.clone(), code, value, matrices, **options)
    for i in range(count):
        row = slice(i, i + 1)
        assert torch.equal(
            together[row], apply_slot(images[row].clone(), code[row], value[row], matrices[row], **options)
        )
    assert torch.equal(together[:: len(names)], images[:: len(names)])


@given(SIZES, SEEDS)
@settings(max_examples=15, deadline=None)
def test_a_resized_crop_is_bit_identical_to_pillow(size, seed):
    height, width = size
    generator = seeded(seed)
    images = pictures(COUNT, height, width, generator)
    tall = torch.randint(1, height + 1, (COUNT,), generator=generator)
    wide = torch.randint(1, width + 1, (COUNT,), generator=generator)
    top = (torch.rand(COUNT, generator=generator) * (height - tall + 1)).long()
    left = (torch.rand(COUNT, generator=generator) * (width - wide + 1)).long()
    flipped = torch.rand(COUNT, generator=generator) < 0.5
    boxes = torch.stack([top, left, tall, wide], 1)
    expected = []
    for image, box, mirror in zip(images, boxes.tolist(), flipped.tolist(), strict=True):
        crop = tv.resized_crop(pillow(image), *box, size=[height, width])
        expected.append(tensor(tv.horizontal_flip(crop) if mirror else crop))
    assert torch.equal(resized_crop(images, boxes[None], flipped[None])[0], torch.stack(expected))


def test_a_histogram_counts_each_channel_of_each_image():
    images = pictures(6, 9, 7, seeded())
    expected = torch.stack(
        [torch.bincount(channel.flatten(), minlength=256) for channel in images.flatten(0, 1).long()]
    )
    assert torch.equal(histogram(images).flatten(0, 1), expected)

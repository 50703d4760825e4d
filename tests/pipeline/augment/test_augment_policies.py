"""The augmentation policies by distribution: frequencies of operations, and image statistics against torchvision."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, v2

from pipeline.augment import apply_views, draw_views
from pipeline.augment.crops import boxes_of, draw_chances
from pipeline.augment.operations import OPERATIONS
from pipeline.augment.policies import (
    AUTOAUGMENT,
    RANDAUGMENT,
    autoaugment_argument,
    draw_autoaugment,
    draw_bicubic,
    draw_jitter,
    draw_randaugment_step,
    draw_soft,
    plan_of,
)
from pipeline.params import AugmentParams

SIDE = 32
MANY = 20_000  # draws
SOME = 1_500  # images augmented one by one in the reference


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def scenes(count):
    """Return smooth colourful pictures with noise, on which every operation has an effect."""
    generator = seeded(7)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic", align_corners=False)
    noise = 0.08 * torch.randn(count, 3, SIDE, SIDE, generator=generator)
    return ((smooth * 0.8 + 0.05 + noise).clamp(0, 1) * 255).to(torch.uint8)


def draw_boxes(count, height, width, scale):
    return boxes_of(draw_chances(count, seeded()), torch.tensor(height), torch.tensor(width), scale)


def params(policy, **keys):
    return AugmentParams(**{"crop_padding": 0, "flip": False, "cutout": 0, "policy": policy, **keys})


def features(images):
    """Return statistics [N,·] that differ between policies: level, spread, edges, saturation, change to the borders."""
    values = images.double()
    edges = (
        (values[..., 1:] - values[..., :-1]).abs().mean((1, 2, 3)),
        (values[:, :, 1:] - values[:, :, :-1]).abs().mean((1, 2, 3)),
    )
    rim = torch.cat([values[:, :, [0, -1]].flatten(1), values[..., [0, -1]].flatten(1)], 1)
    saturation = (values.amax(1) - values.amin(1)).mean((1, 2))
    return torch.stack([values.mean((1, 2, 3)), values.std((1, 2, 3)), *edges, rim.std(1), saturation], 1)


def assert_same_distribution(actual, expected):
    """Assert that mean and variance of every feature agree within five standard errors of a two-sample difference."""
    actual, expected = features(actual), features(expected)
    for one, other in ((actual, expected), (_squares(actual), _squares(expected))):
        error = (one.var(0) / len(one) + other.var(0) / len(other)).sqrt()
        assert ((one.mean(0) - other.mean(0)).abs() < 5 * error).all(), (one.mean(0), other.mean(0), error)


def _squares(values):
    return (values - values.mean(0)) ** 2


def augmented(policy, **keys):
    augment = params(policy, **keys)
    return apply_views(scenes(SOME), draw_views(SOME, SIDE, SIDE, 1, augment, seeded(1)), augment)[0]


def one_by_one(change):
    torch.manual_seed(2)
    pictures = (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in scenes(SOME))
    return torch.stack([torch.from_numpy(np.array(change(picture))).permute(2, 0, 1) for picture in pictures])


def assert_shares(codes, expected):
    """Assert that operation frequencies are within five standard deviations of the binomial."""
    for name in OPERATIONS:
        share = expected.get(name, 0.0)
        actual = (codes == OPERATIONS.index(name)).double().mean().item()
        assert abs(actual - share) <= 5 * (share * (1 - share) / len(codes)) ** 0.5, (name, actual, share)


def test_the_autoaugment_table_equals_torchvision():
    reference = v2.AutoAugment(AutoAugmentPolicy.CIFAR10)
    expected = [
        tuple((name.lower(), probability, index or 0) for name, probability, index in pair)
        for pair in reference._get_policies(AutoAugmentPolicy.CIFAR10)
    ]
    actual = [tuple((name.replace("_", ""), share, index) for name, share, index in pair) for pair in AUTOAUGMENT]
    assert actual == expected


def test_autoaugment_magnitudes_equal_torchvision_except_solarize():
    space = v2.AutoAugment._AUGMENTATION_SPACE
    names = {"shear_x": "ShearX", "shear_y": "ShearY", "translate_x": "TranslateX", "translate_y": "TranslateY"}
    names |= {
        name: name.capitalize() for name in ("rotate", "brightness", "color", "contrast", "sharpness", "posterize")
    }
    for name, theirs in names.items():
        magnitudes, signed = space[theirs]
        for index, magnitude in enumerate(magnitudes(10, 24, SIDE).tolist()):
            middle, spread = autoaugment_argument(name, index, 24, SIDE)
            # Here a rotation has no random sign; an enhancement is 1 ± magnitude.
            actual = middle if name in ("rotate", "posterize") else spread
            assert actual == pytest.approx(magnitude, abs=1e-5)
            assert (spread > 0) == (signed and name != "rotate" and index > 0)
    assert [autoaugment_argument("solarize", index, 24, SIDE)[0] for index in (0, 9)] == [256, 0]


@pytest.mark.parametrize("step", [0, 1])
def test_autoaugment_draws_operations_with_the_probabilities_of_its_table(step):
    codes, _ = draw_autoaugment(MANY, SIDE, SIDE, seeded())[step]
    expected = {"identity": 1 - sum(pair[step][1] for pair in AUTOAUGMENT) / 25}
    for pair in AUTOAUGMENT:
        name, probability, _ = pair[step]
        expected[name] = expected.get(name, 0.0) + probability / 25
    assert_shares(codes, expected)


def test_autoaugment_pairs_are_those_of_the_table():
    (first, _), (second, _) = draw_autoaugment(MANY, SIDE, SIDE, seeded())
    pairs = {(OPERATIONS[a], OPERATIONS[b]) for a, b in set(zip(first.tolist(), second.tolist(), strict=True))}
    named = {(a[0], b[0]) for a, b in AUTOAUGMENT}
    assert {pair for pair in pairs if "identity" not in pair} == {
        pair
        for pair in named
        if pair != ("solarize", "invert")  # its invert has probability 0
    }


def test_autoaugment_changes_pictures_as_torchvisions_does():
    reference = v2.AutoAugment(AutoAugmentPolicy.CIFAR10, fill=128)
    assert_same_distribution(augmented("autoaugment"), one_by_one(reference))


def test_randaugment_takes_each_of_15_operations_half_of_the_time():
    codes, _ = draw_randaugment_step(MANY, SIDE, SIDE, seeded())
    assert len(RANDAUGMENT) == len(set(RANDAUGMENT)) == 15
    assert_shares(codes, {"identity": 0.5} | dict.fromkeys(RANDAUGMENT, 0.5 / 15))


def test_randaugment_draws_both_steps_with_replacement():
    generator = seeded()
    (first, _), (second, _) = (draw_randaugment_step(MANY, SIDE, SIDE, generator) for _ in range(2))
    both = (first == second) & (first != 0)
    share = 0.25 / 15
    assert abs(both.double().mean() - share) < 5 * (share / MANY) ** 0.5


def test_randaugment_magnitudes_are_those_of_level_ten_with_noise_below():
    codes, values = draw_randaugment_step(MANY, 24, SIDE, seeded())
    ranges = {
        "rotate": (30, True),
        "shear_x": (0.3, True),
        "shear_y": (0.3, True),
        "translate_x": (0.45 * SIDE, True),
        "translate_y": (0.45 * 24, True),
        "color": (1.9, False),
        "contrast": (1.9, False),
        "brightness": (1.9, False),
        "sharpness": (1.9, False),
        "posterize": (4, False),
        "solarize": (256, False),
        "solarize_add": (110, False),
    }
    for name, (largest, signed) in ranges.items():
        actual = values[codes == OPERATIONS.index(name)]
        assert actual.abs().max().item() == pytest.approx(largest)
        # Half of the normal draws are at or above 10; the others reach four deviations below.
        assert 0.4 < (actual.abs() > largest * 0.9999).double().mean() < 0.6
        assert actual.abs().min() >= (2.9 if name == "posterize" else 0.75 * largest)
        assert abs((actual < 0).double().mean() - 0.5 * signed) < (0.12 if signed else 1e-9)


def timm_old_randaugment(picture):
    """Reference in Pillow: two of 15 operations with replacement, each applied with probability 0.5."""
    fill = (124, 116, 104)
    bilinear = Image.Resampling.BILINEAR
    for _ in range(2):
        level = min(10 + 0.5 * torch.randn(()).item(), 10.0)
        sign = 1 if torch.rand(()) < 0.5 else -1
        name = RANDAUGMENT[int(torch.randint(15, ()))]
        if torch.rand(()) < 0.5:
            continue
        factor = level / 10 * 1.8 + 0.1
        shear, shift = sign * level * 0.03, sign * level * 0.045 * SIDE
        picture = {
            "autocontrast": lambda image: ImageOps.autocontrast(image),
            "equalize": lambda image: ImageOps.equalize(image),
            "invert": lambda image: ImageOps.invert(image),
            "rotate": lambda image, s=sign, m=level: image.rotate(s * m * 3, bilinear, fillcolor=fill),
            "posterize": lambda image, m=level: ImageOps.posterize(image, int(m * 0.4)),
            "solarize": lambda image, m=level: ImageOps.solarize(image, int(m * 25.6)),
            "solarize_add": lambda image, m=level: image.point(
                [min(255, v + int(m * 11)) if v < 128 else v for v in range(256)] * 3
            ),
            "color": lambda image, f=factor: ImageEnhance.Color(image).enhance(f),
            "contrast": lambda image, f=factor: ImageEnhance.Contrast(image).enhance(f),
            "brightness": lambda image, f=factor: ImageEnhance.Brightness(image).enhance(f),
            "sharpness": lambda image, f=factor: ImageEnhance.Sharpness(image).enhance(f),
            "shear_x": lambda image, k=shear: moved(image, (1, k, 0, 0, 1, 0)),
            "shear_y": lambda image, k=shear: moved(image, (1, 0, 0, k, 1, 0)),
            "translate_x": lambda image, k=shift: moved(image, (1, 0, k, 0, 1, 0)),
            "translate_y": lambda image, k=shift: moved(image, (1, 0, 0, 0, 1, k)),
        }[name](picture)
    return picture


def moved(picture, matrix):
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(124, 116, 104)
    )


def test_randaugment_changes_pictures_as_the_old_form_in_pillow_does():
    assert_same_distribution(augmented("randaugment", jitter=0.0), one_by_one(timm_old_randaugment))


def test_jitter_takes_its_three_operations_in_every_order_by_uniform_factors():
    drawn = draw_jitter(MANY, 0.4, seeded())
    orders = torch.stack([codes for codes, _ in drawn], 1)
    names = [OPERATIONS.index(name) for name in ("brightness", "contrast", "color")]
    for order in itertools.permutations(names):
        share = (orders == torch.tensor(order)).all(1).double().mean().item()
        assert abs(share - 1 / 6) < 5 * (5 / 36 / MANY) ** 0.5
    for _, factors in drawn:
        assert factors.min() >= 0.6 and factors.max() <= 1.4
        # A uniform on [.6, 1.4] has variance .8²/12.
        assert abs(factors.mean() - 1) < 5 * (0.64 / 12 / MANY) ** 0.5


def test_a_fifth_is_grey_and_half_is_blurred_by_a_uniform_radius():
    (grey, _), (blur, radius) = draw_soft(MANY, seeded())
    assert_shares(grey, {"grey": 0.2, "identity": 0.8})
    assert_shares(blur, {"blur": 0.5, "identity": 0.5})
    assert radius.min() >= 0.1 and radius.max() <= 2.0
    assert abs(radius.mean() - 1.05) < 5 * (1.9**2 / 12 / MANY) ** 0.5


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 32), (40, 10)])
def test_boxes_of_a_resized_crop_are_drawn_as_torchvisions(height, width):
    torch.manual_seed(0)
    reference = v2.RandomResizedCrop(SIDE, scale=(0.2, 1.0))
    image, count = torch.zeros(3, height, width), 3000
    keys = ("top", "left", "height", "width")
    drawn = (reference.make_params([image]) for _ in range(count))
    expected = torch.tensor([[box[key] for key in keys] for box in drawn], dtype=torch.float64)
    actual = draw_boxes(count, height, width, [0.2, 1.0]).double()
    for one, other in ((actual, expected), (_squares(actual), _squares(expected))):
        error = (one.var(0) / count + other.var(0) / count).sqrt()
        assert ((one.mean(0) - other.mean(0)).abs() <= 5 * error).all()
    assert (actual[:, 0] + actual[:, 2]).max() <= height and (actual[:, 1] + actual[:, 3]).max() <= width


def test_a_box_that_never_fits_is_the_largest_centred_one_of_an_allowed_ratio():
    boxes = draw_boxes(50, 10, 100, [1.0, 1.0])
    assert torch.equal(boxes, torch.tensor([0, 43, 10, 13]).expand(50, 4))


def test_simaugment_changes_pictures_as_torchvisions_parts_do():
    from PIL import ImageFilter

    def blur(picture):
        return picture.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * torch.rand(()).item()))

    reference = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, interpolation=InterpolationMode.BILINEAR),
            v2.ColorJitter(0.4, 0.4, 0.4),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.Lambda(blur)], 0.5),
            v2.RandomHorizontalFlip(),
        ]
    )
    assert_same_distribution(augmented("simaugment", flip=True), one_by_one(reference))


def test_stacked_is_jitter_grey_and_blur_before_randaugment():
    def names(policy, **keys):
        return list(plan_of(policy, params(policy, **keys)).slots)

    jitter = [("brightness", "contrast", "color")] * 3
    soft, rand = [("grey",), ("blur",)], [RANDAUGMENT] * 2
    assert names("stacked") == [*jitter, *soft, *rand]
    assert names("simaugment") == [*jitter, *soft]
    assert names("randaugment") == [*jitter, *rand]
    assert names("randaugment", jitter=0.0) == rand
    assert plan_of("stacked", params("stacked", crop="resized")).resized
    assert not plan_of("stacked", params("stacked")).resized


def test_bicubic_takes_every_shear_of_autoaugment_and_half_of_randaugments_moves():
    codes = torch.arange(len(OPERATIONS)).repeat(2000)
    shears = (codes == OPERATIONS.index("shear_x")) | (codes == OPERATIONS.index("shear_y"))
    assert torch.equal(draw_bicubic("autoaugment", codes, seeded()), shears)
    drawn = draw_bicubic("randaugment", codes, seeded())
    for code in range(len(OPERATIONS)):
        assert abs(drawn[codes == code].double().mean() - 0.5) < 5 * 0.5 / 2000**0.5


def test_bicubic_autoaugment_equals_pillow_for_a_shear_and_the_default_without_one():
    images, plain, cubic = scenes(SOME), params("autoaugment"), params("autoaugment", bicubic=True)
    draws = [draw_views(SOME, SIDE, SIDE, 1, policy, seeded(3)) for policy in (plain, cubic)]
    codes = draws[0].tables[0][0][:, [3, 11]].long()  # per slot: operation, argument, 6 matrix entries
    moved_by = {OPERATIONS.index("shear_y"): draws[0].tables[0][0][:, 4]}
    actual = [apply_views(images, drawn, policy)[0] for drawn, policy in zip(draws, (plain, cubic), strict=True)]
    sheared = (codes == OPERATIONS.index("shear_y")).any(1)
    assert 0.02 < sheared.double().mean() < 0.2
    assert torch.equal(actual[0][~sheared], actual[1][~sheared]) and not torch.equal(
        actual[0][sheared], actual[1][sheared]
    )
    alone = (codes[:, 0] == OPERATIONS.index("shear_y")) & (codes[:, 1] == 0)
    for row in alone.nonzero().squeeze(1).tolist():
        factor = moved_by[OPERATIONS.index("shear_y")][row].item()
        picture = Image.fromarray(images[row].permute(1, 2, 0).numpy())
        matrix = (1, 0, 0, factor, 1, 0)
        answer = picture.transform(
            picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=(128,) * 3
        )
        apart = (actual[1][row].int() - torch.from_numpy(np.array(answer)).permute(2, 0, 1).int()).abs()
        assert (apart > 1).double().mean() < 5e-3

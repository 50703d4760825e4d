"""Augmentation policies: the possible operations of each slot of a view, and the random choice of operation and argument.

A policy is a sequence of slots; in each slot an image gets one operation or none. Sources: AutoAugment (Cubuk et al.
2019, CIFAR-10 table), RandAugment (Cubuk et al. 2020) in the form of timm before its "increasing" variants, SimAugment
as in PaCo and GML.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.augment.affine import AFFINE, Method
from pipeline.augment.operations import CODE, IDENTITY
from pipeline.params import AugmentParams

GREY_SHARE = 0.2
BLUR_SHARE = 0.5
BLUR_RADIUS = (0.1, 2.0)
JITTERED = ("brightness", "contrast", "color")

# AutoAugment's table for CIFAR-10: 25 sub-policies of two steps (operation, probability, magnitude index 0 to 9).
AUTOAUGMENT = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
)

RANDAUGMENT = (
    "autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color", "contrast",
    "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
RANDAUGMENT_STEPS = 2
RANDAUGMENT_SHARE = 0.5
RANDAUGMENT_MAGNITUDE = (10.0, 0.5)  # mean and standard deviation; 10 is the maximum


Slot = tuple[str, ...]  # the possible operations, besides none


def is_geometric(slot: Slot) -> bool:
    """Whether an operation of the slot moves pixels."""
    return any(name in AFFINE for name in slot)


@dataclass(frozen=True)
class Plan:
    """Description of a view without its random numbers: crop, slots, fill colour, interpolation, side of the Cutout square."""

    resized: bool
    slots: tuple[Slot, ...]
    fill: tuple[int, int, int]
    method: Method
    cutout: int


def plan_of(policy: str, params: AugmentParams) -> Plan:
    """Plan of a policy. simaugment always has a resized crop and no Cutout; the other policies take both from params."""
    jitter = [JITTERED] * 3 if params.jitter else []
    soft, rand = [("grey",), ("blur",)], [RANDAUGMENT] * RANDAUGMENT_STEPS
    auto = [tuple(sorted({pair[step][0] for pair in AUTOAUGMENT if pair[step][1] > 0})) for step in (0, 1)]
    slots: list[Slot] = {
        "none": [],
        "autoaugment": auto,
        "randaugment": [*jitter, *rand],
        "simaugment": [*jitter, *soft],
        "stacked": [*jitter, *soft, *rand],
    }[policy]
    sim = policy == "simaugment"
    return Plan(
        resized=sim or params.crop == "resized",
        slots=tuple(slots),
        fill=(128, 128, 128) if policy == "autoaugment" else (124, 116, 104),
        method="nearest" if policy == "autoaugment" else "bilinear",
        cutout=0 if sim else params.cutout,
    )


def draw_slots(
    policy: str, count: int, height: int, width: int, params: AugmentParams, generator: torch.Generator
) -> list[tuple[Tensor, Tensor]]:
    """Draw, for each slot of the plan, operation codes int64 [count] and arguments float64 [count] for `apply_slot`."""
    if policy == "none":
        return []
    if policy == "autoaugment":
        return draw_autoaugment(count, height, width, generator)
    drawn = draw_jitter(count, params.jitter, generator) if params.jitter else []
    if policy in ("simaugment", "stacked"):
        drawn += draw_soft(count, generator)
    if policy in ("randaugment", "stacked"):
        drawn += [draw_randaugment_step(count, height, width, generator) for _ in range(RANDAUGMENT_STEPS)]
    return drawn


def draw_autoaugment(count: int, height: int, width: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Draw one sub-policy per image; each of its two steps is applied with its probability."""
    which = torch.randint(len(AUTOAUGMENT), (count,), generator=generator)
    drawn = []
    for step in (0, 1):
        taken, sign = _uniform(count, generator), _sign(count, generator)
        entries = [pair[step] for pair in AUTOAUGMENT]
        arguments = [autoaugment_argument(name, index, height, width) for name, _, index in entries]
        codes = torch.tensor([CODE[name] for name, _, _ in entries])
        probability = torch.tensor([share for _, share, _ in entries], dtype=torch.float64)
        middle, spread = torch.tensor(arguments, dtype=torch.float64).unbind(1)
        code = torch.where(taken < probability[which], codes[which], CODE[IDENTITY])
        drawn.append((code, middle[which] + sign * spread[which]))
    return drawn


def autoaugment_argument(name: str, index: int, height: int, width: int) -> tuple[float, float]:
    """Argument of an operation at magnitude index 0..9 as (middle, spread): middle ± spread, with a random sign.

    Rotation is always counter-clockwise and solarize counts from 256, as in the widely used CIFAR code (torchvision:
    both directions, and from 255).
    """
    magnitude = index / 9
    if name in ("shear_x", "shear_y"):
        return 0.0, 0.3 * magnitude
    if name in ("translate_x", "translate_y"):
        return 0.0, 150 / 331 * (width if name == "translate_x" else height) * magnitude
    if name in ("brightness", "color", "contrast", "sharpness"):
        return 1.0, 0.9 * magnitude
    fixed = {"rotate": 30 * magnitude, "posterize": round(8 - 4 * magnitude), "solarize": 256 * (1 - magnitude)}
    return float(fixed.get(name, 0.0)), 0.0


def draw_randaugment_step(count: int, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw one of 15 operations per image, applied with probability 1/2, with a magnitude normal about 10 and at most 10."""
    which = torch.randint(len(RANDAUGMENT), (count,), generator=generator)
    taken, sign = _uniform(count, generator), _sign(count, generator)
    mean, deviation = RANDAUGMENT_MAGNITUDE
    noise = torch.randn(count, dtype=torch.float64, generator=generator)
    level = (mean + deviation * noise).clamp(0, 10) / 10
    factor = 0.1 + 1.8 * level
    arguments = {
        "rotate": 30 * level * sign,
        "posterize": torch.floor(4 * level),
        "solarize": torch.floor(256 * level),
        "solarize_add": torch.floor(110 * level),
        **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), factor),
        "shear_x": 0.3 * level * sign,
        "shear_y": 0.3 * level * sign,
        "translate_x": 0.45 * width * level * sign,
        "translate_y": 0.45 * height * level * sign,
    }
    table = torch.stack([arguments.get(name, torch.zeros_like(level)) for name in RANDAUGMENT])
    codes = torch.tensor([CODE[name] for name in RANDAUGMENT])
    code = torch.where(taken < RANDAUGMENT_SHARE, codes[which], CODE[IDENTITY])
    return code, table.gather(0, which[None]).squeeze(0)


def draw_bicubic(policy: str, code: Tensor, generator: torch.Generator) -> Tensor:
    """Images bool [count] whose geometric operation code [count] uses bicubic interpolation, as in the authors' programs.

    AutoAugment: every shear. RandAugment: a random half of the images.
    """
    if policy == "autoaugment":
        return (code == CODE["shear_x"]) | (code == CODE["shear_y"])
    return torch.randint(2, code.shape, generator=generator).bool()


def draw_jitter(count: int, strength: float, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Draw brightness, contrast and saturation factors uniform in 1 ± strength, in a random order per image."""
    order = torch.rand(count, len(JITTERED), generator=generator).argsort(1)
    codes = torch.tensor([CODE[name] for name in JITTERED])[order]
    factors = 1 - strength + 2 * strength * torch.rand(count, len(JITTERED), dtype=torch.float64, generator=generator)
    return list(zip(codes.unbind(1), factors.unbind(1), strict=True))


def draw_soft(count: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Draw grey for a fifth of the images, then a Gaussian blur of uniform radius for half of them."""
    grey = torch.where(_uniform(count, generator) < GREY_SHARE, CODE["grey"], CODE[IDENTITY])
    blur = torch.where(_uniform(count, generator) < BLUR_SHARE, CODE["blur"], CODE[IDENTITY])
    low, high = BLUR_RADIUS
    radius = low + (high - low) * _uniform(count, generator)
    return [(grey, torch.zeros_like(radius)), (blur, radius)]


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, dtype=torch.float64, generator=generator)


def _sign(count: int, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(2, (count,), generator=generator) - 1

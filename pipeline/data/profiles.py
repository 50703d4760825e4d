"""Long-tail profiles: the number of images that each class keeps, and the choice of images."""

from __future__ import annotations

import numpy as np


def class_sizes(profile: str, available: list[int], imbalance_factor: float) -> list[int]:
    """Number of images that each class keeps; class 0 is the head, class C-1 the tail.

    available: images per class. With n = (sum of available) / C images for the head and f = 1/imbalance_factor:
    `natural` keeps all; `exponential` keeps int(n * f^(c/(C-1))); `step` keeps int(n) in the first half of the classes
    and int(n*f) in the rest (both the CIFAR-LT rule of Cao et al. 2019, truncated, not rounded); `pareto` keeps
    int(n * (c+1)^-a) with a such that the last class keeps n*f. A class never keeps more images than it has. Raises
    ValueError when a class would keep none.
    """
    classes = len(available)
    head = sum(available) / classes
    tail = 1.0 / imbalance_factor
    if profile == "natural":
        return list(available)
    if profile == "exponential":
        sizes = [int(head * tail ** (c / (classes - 1.0))) for c in range(classes)]
    elif profile == "step":
        sizes = [int(head) if c < classes // 2 else int(head * tail) for c in range(classes)]
    elif profile == "pareto":
        exponent = np.log(imbalance_factor) / np.log(classes)
        # Rounding to 1e-9 keeps the last class at n*f if the power is slightly below the integer.
        sizes = [int(round(head * (c + 1) ** -exponent, 9)) for c in range(classes)]
    else:
        raise ValueError(f"profile is {profile!r}; expected natural, exponential, pareto or step")
    sizes = [min(size, count) for size, count in zip(sizes, available, strict=True)]
    if min(sizes) < 1:
        raise ValueError(
            f"profile {profile} with imbalance factor {imbalance_factor:g} leaves class {sizes.index(min(sizes))} without "
            f"images (head {int(head)}); lower the factor to at most {head:g}"
        )
    return sizes


def test_size(images: int, per_class: int, share: float | None) -> int:
    """Number of test images held out of a class of `images`: per_class, or its `share`, at least one and at most per_class.

    With a share at least one image stays for training. Without a share the caller must reject a class of per_class
    images or less.
    """
    if share is None:
        return per_class
    # Rounding to 1e-9 keeps 0.29 of 100 images at 29.
    return max(min(per_class, max(1, int(round(share * images, 9))), images - 1), 0)


def validation_size(images: int, spare: int, per_class: int, share: float) -> int:
    """Validation images held out of the `images` of a class, in addition to those from its `spare` (dropped) images."""
    return max(0, min(per_class - min(spare, per_class), int(share * images), images - 1))


def choose_images(labels: np.ndarray, sizes: list[int], seed: int) -> list[np.ndarray]:
    """Indices kept of each class, in shuffled order: the sample choice of CIFAR-LT (Cao et al. 2019).

    labels: [N] integers. One legacy numpy generator shuffles class after class, and the first sizes[c] indices are
    kept. So the choices are nested: a larger imbalance keeps a subset of a smaller one.
    """
    generator = np.random.RandomState(seed)
    chosen = []
    for members, size in zip(class_members(labels, len(sizes)), sizes, strict=True):
        generator.shuffle(members)
        chosen.append(members[:size])
    return chosen


def class_members(labels: np.ndarray, classes: int) -> list[np.ndarray]:
    """Indices of each class in ascending order. labels: [N] integers 0..classes-1. Sorts once, for any number of classes."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.cumsum(np.bincount(labels, minlength=classes))[:-1])

"""Facts of published data sets: image counts of every split, and the images that CIFAR-LT keeps."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from models.prior import GROUPS
from pipeline.data.profiles import class_members
from pipeline.params import DataParams
from pipeline.shared.errors import DataError


@dataclass(frozen=True)
class PublishedDataset:
    """Images of each split, number of classes, the largest and smallest training class, and classes by shot group."""

    images: dict[str, int]
    classes: int
    largest: int
    smallest: int
    groups: dict[str, int]


# ImageNet-LT and Places-LT: Liu et al. 2019 and its lists. iNaturalist 2018: its competition page; its validation
# images are used as test split in the literature. CIFAR: Krizhevsky 2009.
PUBLISHED = {
    name: PublishedDataset(images, classes, largest, smallest, dict(zip(GROUPS, groups, strict=True)))
    for name, images, classes, largest, smallest, groups in (
        ("cifar10", {"train": 50_000, "test": 10_000}, 10, 5000, 5000, (10, 0, 0)),
        ("cifar100", {"train": 50_000, "test": 10_000}, 100, 500, 500, (100, 0, 0)),
        ("imagenet_lt", {"train": 115_846, "validation": 20_000, "test": 50_000}, 1000, 1280, 5, (385, 479, 136)),
        ("places_lt", {"train": 62_500, "validation": 7_300, "test": 36_500}, 365, 4980, 5, (131, 163, 71)),
        ("inaturalist2018", {"train": 437_513, "test": 24_426}, 8142, 1000, 2, (842, 4076, 3224)),
    )
}

# The choice of Cao et al. 2019 (numpy's legacy generator, seed 0): source, imbalance factor → images kept, and
# sha256[:16] of their ranks within the class, class after class, little-endian int64.
CIFAR_LT = {
    ("cifar10", 10): (20_431, "2b3a8656bec514c6"),
    ("cifar10", 50): (13_996, "7bb90363b243a944"),
    ("cifar10", 100): (12_406, "8a54f5b6fa972295"),
    ("cifar100", 10): (19_573, "5906ba7310b91b5e"),
    ("cifar100", 50): (12_608, "1bc82de2629e5cbd"),
    ("cifar100", 100): (10_847, "f123ec136d44ab1b"),
}


def published_choice(origin: str, params: DataParams) -> tuple[int, str] | None:
    """Images and hash of the published CIFAR-LT split that the params describe; None if they describe another split."""
    if params.profile != "exponential" or params.seed != 0 or params.max_per_class:
        return None
    return CIFAR_LT.get((origin, int(params.imbalance_factor))) if params.imbalance_factor % 1 == 0 else None


def hash_of_ranks(labels: np.ndarray, chosen: list[np.ndarray]) -> str:
    """sha256[:16] of the chosen images' ranks within their class, class after class.

    labels: [N] integers in file order. chosen: for each class, indices into labels.
    """
    members = class_members(labels, len(chosen))
    ranks = [np.searchsorted(own, indices) for own, indices in zip(members, chosen, strict=True)]
    return hashlib.sha256(np.concatenate(ranks).astype("<i8").tobytes()).hexdigest()[:16]


def check_published_choice(origin: str, params: DataParams, labels: np.ndarray, chosen: list[np.ndarray]) -> None:
    """Raise DataError when params describe a published CIFAR-LT split of the whole archive and other images were chosen."""
    published = published_choice(origin, params)
    if published is None or len(labels) != PUBLISHED[origin].images["train"]:
        return
    digest = hash_of_ranks(labels, chosen)
    if digest != published[1]:
        raise DataError(
            f"{origin}: the images kept at imbalance factor {params.imbalance_factor:g} hash to {digest}, "
            f"the published split to {published[1]}; results would not be comparable (another numpy, or another archive?)"
        )

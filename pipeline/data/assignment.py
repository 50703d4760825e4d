"""Assignment of a source's rows to splits: held-out test, long-tail profile, held-out validation."""

from __future__ import annotations

import numpy as np

from pipeline.data.groups import ImageGroups, hold_out_groups
from pipeline.data.profiles import choose_images, class_members, class_sizes, test_size, validation_size
from pipeline.data.published import check_published_choice
from pipeline.params import DataParams
from pipeline.shared.errors import DataError, ParamsError
from pipeline.sources import Row, Source
from serving.shared.terminal import counted

SPLITS = ("train", "validation", "test")


def without(source: Source, skipped: list[Row], classes: list[str] | None = None) -> list[Row]:
    """The source's rows without the skipped ones. Raises DataError when a class has no training image left.

    classes: names of the labels of rows; None: those of the source.
    """
    skipped_references = {row.reference for row in skipped}
    rows = [row for row in source.rows if row.reference not in skipped_references]
    train_labels = {row.label for row in rows if row.split == "train"}
    empty = [
        name for label, name in enumerate(source.classes if classes is None else classes) if label not in train_labels
    ]
    if empty:
        raise DataError(
            f"class {empty[0]!r} has no usable training image (such classes: {len(empty)}; "
            f"{counted(len(skipped), 'image')} left out by "
            "data.on_bad_image: skip); `tailor data check` lists the images"
        )
    return rows


def assign(
    rows: list[Row], classes: list[str], params: DataParams, origin: str = "", groups: ImageGroups | None = None
) -> dict[str, list[Row]]:
    """Assign rows to splits by the splits of the source and params.data. Rows that the profile drops are in no split.

    Steps: 1. Test is held out, unless the source has a test split: `profiles.test_size` images of each class. 2. Each
    class is cut to max_per_class images. 3. The profile chooses the images for training. 4. Validation is held out,
    unless the source has a validation split: validation_per_class images, first from those that the profile dropped,
    then at most validation_share of the class's training images. For a data set of known origin, the choice of the
    profile is compared with the published one. groups: of the images, by reference; whole groups are then held out, also
    of images that the profile dropped, and a class with too few groups has no held-out image.
    """
    hinted = {split: [row for row in rows if row.split == split] for split in SPLITS}
    pool, test = hinted["train"], hinted["test"]
    generator = np.random.default_rng(params.seed)
    if not test and groups:
        pool, test = _hold_out_test_groups(pool, len(classes), params, groups, hinted["validation"], generator)
    elif not test:
        pool, test = _hold_out_test(pool, classes, params, generator)
    if params.max_per_class:
        labels = np.array([row.label for row in pool])
        capped = choose_images(labels, [params.max_per_class] * len(classes), params.seed)
        pool = [pool[i] for i in np.sort(np.concatenate(capped))]
    labels = np.array([row.label for row in pool])
    available = np.bincount(labels, minlength=len(classes)).tolist()
    try:
        sizes = class_sizes(params.profile, available, params.imbalance_factor)
    except ValueError as error:
        raise ParamsError(f"data.{error}") from None
    chosen = choose_images(labels, sizes, params.seed)
    check_published_choice(origin, params, labels, chosen)
    validation = hinted["validation"]
    if not validation:
        members = class_members(labels, len(classes))
        dropped = [np.setdiff1d(own, train) for own, train in zip(members, chosen, strict=True)]
        if not groups:
            chosen, held = _hold_out_validation(chosen, dropped, params, generator)
        else:
            chosen, held = _hold_out_validation_groups(pool, chosen, dropped, params, groups, test, generator)
        validation = [pool[i] for i in held]
    return {"train": [pool[i] for i in np.concatenate(chosen)], "validation": validation, "test": test}


def _hold_out_test(
    pool: list[Row], classes: list[str], params: DataParams, generator: np.random.Generator
) -> tuple[list[Row], list[Row]]:
    labels = np.array([row.label for row in pool])
    held: list[int] = []
    for name, members in zip(classes, class_members(labels, len(classes)), strict=True):
        size = test_size(len(members), params.test_per_class, params.test_share)
        if not size or len(members) <= size:
            raise DataError(
                f"class {name!r} has {counted(len(members), 'image')}, too few to hold out data.test_per_class = "
                f"{size or 1} and train; {'lower it, ' if size > 1 else ''}add images, or give the source a test split"
            )
        held.extend(sorted(generator.permutation(members)[:size].tolist()))
    held_set = set(held)
    return [row for i, row in enumerate(pool) if i not in held_set], [pool[i] for i in held]


def _hold_out_validation(
    chosen: list[np.ndarray], dropped: list[np.ndarray], params: DataParams, generator: np.random.Generator
) -> tuple[list[np.ndarray], list[int]]:
    remaining, held = [], []
    for train, spare in zip(chosen, dropped, strict=True):
        from_spare = generator.permutation(spare)[: params.validation_per_class]
        size = validation_size(len(train), len(spare), params.validation_per_class, params.validation_share)
        from_train = generator.permutation(train)[:size] if size > 0 else train[:0]
        remaining.append(train[~np.isin(train, from_train)])
        held.extend(sorted([*from_spare.tolist(), *from_train.tolist()]))
    return remaining, held


def _hold_out_test_groups(
    pool: list[Row],
    classes: int,
    params: DataParams,
    groups: ImageGroups,
    validation: list[Row],
    generator: np.random.Generator,
) -> tuple[list[Row], list[Row]]:
    labels = np.array([row.label for row in pool])
    counts = np.bincount(labels, minlength=classes).tolist()
    targets = [min(test_size(count, params.test_per_class, params.test_share), count - 1) for count in counts]
    codes, blocked = _codes(pool, groups, validation)
    held = hold_out_groups(labels, codes, targets, np.ones(len(pool), bool), blocked, generator)
    test = sorted(np.flatnonzero(held).tolist(), key=lambda i: (pool[i].label, i))
    return [row for row, out in zip(pool, held, strict=True) if not out], [pool[i] for i in test]


def _hold_out_validation_groups(
    pool: list[Row],
    chosen: list[np.ndarray],
    dropped: list[np.ndarray],
    params: DataParams,
    groups: ImageGroups,
    test: list[Row],
    generator: np.random.Generator,
) -> tuple[list[np.ndarray], list[int]]:
    most = params.validation_per_class
    targets = [
        min(len(spare), most) + validation_size(len(train), len(spare), most, params.validation_share)
        for train, spare in zip(chosen, dropped, strict=True)
    ]
    codes, blocked = _codes(pool, groups, test)
    trains = np.isin(np.arange(len(pool)), np.concatenate(chosen))
    held = hold_out_groups(np.array([row.label for row in pool]), codes, targets, trains, blocked, generator)
    validation = sorted(np.flatnonzero(held).tolist(), key=lambda i: (pool[i].label, i))
    return [train[~held[train]] for train in chosen], validation


def _codes(pool: list[Row], groups: ImageGroups, others: list[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Number of the group of each image, int [N], and whether the group has images in `others`, bool [N]."""
    numbers: dict[str, int] = {}
    codes = [numbers.setdefault(groups[row.reference], len(numbers)) for row in pool]
    elsewhere = {groups[row.reference] for row in others}
    return np.array(codes), np.array([groups[row.reference] in elsewhere for row in pool], dtype=bool)

"""Groups of images that stay in one split: images of a place, patient or sequence, or near duplicates (data.group)."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from pipeline.data.duplicates import group_near_duplicates, perceptual_hash
from pipeline.data.inspection import SHOWN, InspectionResult, inspect_image
from pipeline.params import DataParams
from pipeline.shared.errors import DataError
from pipeline.sources import Row, Source, SourceWithIngested
from serving.shared.terminal import counted

NEAR = "near"
NEAR_BITS = 4  # of 64 in which the perceptual hashes of near duplicates may differ, as in `data check`
MIN_HASHED_SIDE = 32  # pixels, the input size of the perceptual hash; it cannot distinguish smaller images
COLUMN, PATH = "column:", "path:"
SWEEPS = 20  # over all groups; two or three are usual
ImageGroups = dict[str, str]  # reference of an image → name of its group


def hash_function(params: DataParams) -> Callable[[Image.Image], str] | None:
    """The perceptual hash if data.group needs it, else None."""
    return perceptual_hash if params.group == NEAR else None


def path_group(pattern: str, path: str) -> str | None:
    """Group of a path: the text that the pattern's parentheses match, or the whole match; None without a match."""
    match = re.search(pattern, path)
    if match is None:
        return None
    return "/".join(part or "" for part in match.groups()) if match.re.groups else match[0]


def stored_group(setting: str | None, path: str, cell: object = None) -> str | None:
    """Group of an image by data.group, from its path or its cell of the column; None for near and without data.group."""
    if setting is None or setting == NEAR:
        return None
    if setting.startswith(COLUMN):
        return None if cell in (None, "") else str(cell)
    return path_group(setting.removeprefix(PATH), path)


def image_groups(
    source: Source, rows: Sequence[Row], params: DataParams, inspected: Mapping[str, InspectionResult]
) -> tuple[ImageGroups, int]:
    """Group of each image by data.group, and the number of images without one; ({}, 0) if data.group is null.

    An image without a value in the column, or whose sample id the regular expression does not match, is a group of its
    own. Raises DataError if no image has a group, ParamsError if the source has no such column.
    """
    if params.group is None:
        return {}, 0
    if params.group == NEAR:
        return _near_groups(rows, inspected), 0
    if params.group.startswith(COLUMN):
        values = source.column(params.group.removeprefix(COLUMN))
        found = {row.reference: values.get(row.reference) for row in rows}
    else:
        found = {row.reference: stored_group(params.group, row.sample_id) for row in rows}
    alone = [row for row in rows if found[row.reference] is None]
    if len(alone) == len(rows):
        raise DataError(
            f"data.group is {params.group!r}, which gives no image a group; the first image is {rows[0].sample_id!r}"
        )
    return {row.reference: _named(found[row.reference], row) for row in rows}, len(alone)


def _named(value: str | None, row: Row) -> str:
    return f"image {row.sample_id}" if value is None else value


def _near_groups(rows: Sequence[Row], inspected: Mapping[str, InspectionResult]) -> ImageGroups:
    """Near duplicates, linked as in `group_near_duplicates`; images below MIN_HASHED_SIDE only if byte-identical."""
    groups = {row.reference: inspected[row.reference].sha256 or row.sample_id for row in rows}
    for members in group_near_duplicates([_hash_text(inspected[row.reference]) for row in rows], NEAR_BITS):
        groups |= {rows[index].reference: groups[rows[members[0]].reference] for index in members}
    return groups


def _hash_text(image: InspectionResult) -> str:
    return image.perceptual_hash if min(image.width, image.height) >= MIN_HASHED_SIDE else ""


def ingested_groups(
    source: SourceWithIngested,
    held_out: Sequence[Row],
    params: DataParams,
    groups: ImageGroups,
    inspected: Mapping[str, InspectionResult],
) -> ImageGroups:
    """Group of each ingested image; one that belongs to the group of a held-out image has that group. {} without groups.

    held_out: images of validation and test. Near duplicates are linked through other ingested images too, so that a
    sequence does not come into training because one of its images is missing among the held-out ones.
    """
    if not groups:
        return {}
    rows = source.ingested
    if params.group != NEAR:
        stored, names = source.shards.groups_for(str(params.group)), source.shards.names()
        stored = {ref: stored.get(ref) or stored_group(params.group, name) for ref, name in names.items()}
        return {row.reference: _named(stored.get(row.reference), row) for row in rows}
    images = [inspected[row.reference] for row in held_out]
    images += [inspect_image(source, row, perceptual_hash) for row in rows]
    together = [*held_out, *rows]
    own = {row.reference: row.sample_id for row in rows}
    for members in group_near_duplicates([_hash_text(image) for image in images], NEAR_BITS):
        first = together[members[0]].reference  # held-out images come first
        own |= {together[i].reference: groups.get(first, own.get(first, "")) for i in members if i >= len(held_out)}
    return own


def hold_out_groups(
    labels: np.ndarray,
    codes: np.ndarray,
    targets: Sequence[int],
    trains: np.ndarray,
    blocked: np.ndarray,
    generator: np.random.Generator,
) -> np.ndarray:
    """Choose whole groups to hold out, bool [N]: near the wanted number of images of each class, training in each class.

    labels: int [N]. codes: group of each image, int [N] from 0. targets: wanted held-out images of each class [C].
    trains: bool [N], images that training would use; each class keeps at least one. blocked: bool [N], images whose
    groups must stay. Greedy on sum_c ((held_c - target_c) / target_c)^2: first a group for each class, the class with
    the fewest groups first (iterative stratification, Sechidis et al. 2011); then groups are moved, in random order, in or
    out, while that brings the numbers nearer to the targets. A class for which no group can be spared has no held-out image.
    """
    classes = len(targets)
    content = _group_content(labels, codes, trains, classes)
    for code in np.unique(codes[blocked]).tolist():
        del content[code]
    order = [code for code in generator.permutation(int(codes.max()) + 1).tolist() if code in content]
    members: dict[int, list[int]] = defaultdict(list)
    for code in order:
        for label, _, _ in content[code]:
            members[label].append(code)
    held, left = [0] * classes, np.bincount(labels[trains], minlength=classes).tolist()
    chosen: set[int] = set()

    def gain(code: int, sign: int) -> float:
        """Decrease of the sum when a group is held out (sign 1) or returned to training (-1)."""
        return sum(
            images * (2 * sign * (targets[label] - held[label]) - images) / max(targets[label], 1) ** 2
            for label, images, _ in content[code]
        )

    def can_move(code: int, sign: int) -> bool:
        if sign < 0:
            return all(held[label] > images or not targets[label] for label, images, _ in content[code])
        return all(left[label] > trained for label, _, trained in content[code])

    def move(code: int, sign: int) -> None:
        chosen.symmetric_difference_update({code})
        for label, images, trained in content[code]:
            held[label] += sign * images
            left[label] -= sign * trained

    for label in sorted(members, key=lambda label: len(members[label])):
        candidates = [code for code in members[label] if can_move(code, 1)] if not held[label] else []
        if candidates and targets[label]:
            move(max(candidates, key=lambda code: gain(code, 1)), 1)
    for _ in range(SWEEPS):
        before = set(chosen)
        for code in order:
            sign = -1 if code in chosen else 1
            if can_move(code, sign) and gain(code, sign) > 0:
                move(code, sign)
        if chosen == before:
            break
    return np.isin(codes, list(chosen))


def _group_content(
    labels: np.ndarray, codes: np.ndarray, trains: np.ndarray, classes: int
) -> dict[int, list[tuple[int, int, int]]]:
    """Map each group to its classes: (class, images, training images)."""
    cells, cell, counts = np.unique(codes.astype(np.int64) * classes + labels, return_inverse=True, return_counts=True)
    training = np.bincount(cell, trains, minlength=len(cells)).astype(np.int64)
    content: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for key, images, trained in zip(cells.tolist(), counts.tolist(), training.tolist(), strict=True):
        content[key // classes].append((key % classes, images, trained))
    return content


def group_remarks(
    assigned: Mapping[str, Sequence[Row]], groups: ImageGroups, classes: Sequence[str], alone: int
) -> list[str]:
    """Lines on what data.group could not do: classes with too few groups, groups in two splits, images without a group.

    groups: {} without data.group, which gives no line. Groups in two splits come from splits that the source defines.
    """
    if not groups:
        return []
    lines = []
    if alone:
        lines.append(f"{counted(alone, 'image', 'have')} no group by data.group; each is a group of its own")
    own: dict[int, set[str]] = defaultdict(set)
    for rows in assigned.values():
        for row in rows:
            own[row.label].add(groups[row.reference])
    for split in ("test", "validation"):
        present = {row.label for row in assigned[split]}
        missing = [label for label in range(len(classes)) if label not in present] if assigned[split] else []
        if missing:
            named = ", ".join(f"{classes[label]} ({counted(len(own[label]), 'group')})" for label in missing[:SHOWN])
            lines.append(
                f"{counted(len(missing), 'class', 'have')} no {split} image, as {'its' if len(missing) == 1 else 'their'} "
                f"groups are too few: {named}{', …' if len(missing) > SHOWN else ''}"
            )
    splits = Counter(group for rows in assigned.values() for group in {groups[row.reference] for row in rows})
    if shared := sum(number > 1 for number in splits.values()):
        lines.append(
            f"{counted(shared, 'group', 'are')} in more than one split of the source; the report shows the accuracy of "
            "groups that training has not seen"
        )
    return lines

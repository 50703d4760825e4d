"""`data check`: check a data set for bad files, duplicates, label conflicts and differences from published figures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from models.prior import GROUPS, class_names_problem, shot_group
from models.sample_size import SampleSize, sample_sizes
from pipeline.data.assignment import SPLITS, assign, without
from pipeline.data.duplicates import conflicting_labels, group_duplicates, group_near_duplicates, perceptual_hash
from pipeline.data.groups import MIN_HASHED_SIDE, NEAR, group_remarks, image_groups
from pipeline.data.inspection import InspectionResult, Journal, inspect_images
from pipeline.data.profiles import choose_images, class_sizes
from pipeline.data.published import PUBLISHED, hash_of_ranks, published_choice
from pipeline.data.split_tables import read_taxonomy_file
from pipeline.params import DataParams, Params
from pipeline.segmentation import figures
from pipeline.shared.artifacts import sha256_of_json
from pipeline.shared.errors import StageError
from pipeline.sources import FolderSource, LabelMapSource, Row, Source, open_base_source
from serving.shared.terminal import counted

Assigned = dict[str, list[Row]]


@dataclass(frozen=True)
class PublishedFigure:
    """A published figure of a data set and the measured one."""

    figure: str
    published: str
    measured: str

    @property
    def same(self) -> bool:
        """Whether the two figures are equal."""
        return self.published == self.measured


@dataclass
class DataReport:
    """Result of a data check; counts are of images.

    verdict, problems, remarks: lines of text. verdict: errors with which `split` would fail. problems: errors that
    `split` accepts and that make metrics wrong (duplicates in two splits). remarks: how the source reads folders that a
    user may not expect, and what data.group could not do. label_maps: set for task segmentation, where `classes` is the one
    class of all images.
    """

    source: str
    location: str
    classes: list[str]
    assigned: Assigned
    inspected: dict[str, InspectionResult]
    counts: dict[str, list[int]]
    bad: list[Row]
    conflicts: list[tuple[Row, Row]]
    duplicates: dict[str, list[tuple[str, Row]]]
    near_duplicates: list[list[tuple[str, Row]]] | None
    list_hash: str
    content_hash: str
    published: list[PublishedFigure]
    verdict: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    label_maps: figures.LabelMapFigures | None = None

    @property
    def imbalance_factor(self) -> float:
        """Images of the largest class / images of the smallest class, of the training split."""
        train = self.counts["train"]
        return max(train) / max(min(train), 1)

    def groups(self) -> dict[str, int]:
        """Number of classes by shot group."""
        groups = [shot_group(count) for count in self.counts["train"]]
        return {group: groups.count(group) for group in GROUPS}

    def test_sizes(self) -> dict[str, SampleSize]:
        """Sample sizes of the test split, for all classes and by shot group; empty if the test split is empty."""
        return sample_sizes(self.counts["test"], [shot_group(count) for count in self.counts["train"]])

    def count_missing(self) -> int:
        """Number of images whose file is missing."""
        return sum(self.inspected[row.reference].missing for row in self.bad)

    def across_splits(self, groups: list[list[tuple[str, Row]]]) -> int:
        """Number of groups of duplicates that have images in more than one split."""
        return sum(len({split for split, _ in group}) > 1 for group in groups)

    def image_sizes(self) -> dict[str, tuple[int, int]]:
        """Width and height in pixels of the smallest, median and largest usable image, by area."""
        sizes = sorted((i.width * i.height, i.width, i.height) for i in self.inspected.values() if not i.problem)
        if not sizes:
            return {}
        ranks = {"smallest": 0, "median": len(sizes) // 2, "largest": -1}
        return {name: sizes[rank][1:] for name, rank in ranks.items()}


def check(
    params: Params, journal: Path, near: int | None = 4, jobs: int | None = None, fresh: bool = False
) -> DataReport:
    """Read every image of the source and run all checks.

    journal: file of results per image, with which an interrupted check resumes; `fresh` deletes it first. near: bits in
    which the perceptual hashes of near duplicates may differ; None skips the search. jobs: images read in parallel.
    Raises DataError or ParamsError if the source cannot be opened.
    """
    data = params.data
    source = open_base_source(data)
    if fresh:
        journal.unlink(missing_ok=True)
    hashed = near is not None or data.group == NEAR
    about = [data.source, data.location, data.table.model_dump(), hashed]
    settings = sha256_of_json([*about, data.label_map.model_dump()] if data.label_map else about)
    classes = ["images"] if data.label_map else source.classes
    inspected = inspect_images(source, "check", perceptual_hash if hashed else None, Journal(journal, settings), jobs)
    bad = [row for row in source.rows if inspected[row.reference].problem]
    verdict = _source_problems(source, data, bad, inspected)
    remarks = [*source.remarks] if isinstance(source, FolderSource) else []
    try:
        rows = without(source, bad, classes) if data.on_bad_image == "skip" else source.rows
        groups, alone = image_groups(source, rows, data, inspected)
        assigned = assign(rows, classes, data, source.origin, groups)
        remarks += group_remarks(assigned, groups, classes, alone)
    except StageError as error:
        verdict.append(str(error))
        assigned = {split: [row for row in source.rows if row.split == split] for split in SPLITS}
    hashes = {reference: image.sha256 for reference, image in inspected.items() if image.sha256}
    conflicts = conflicting_labels(source.rows, hashes)
    if conflicts and source.origin not in PUBLISHED:
        verdict.append(_conflict_problem(conflicts, source))
    published = compare_with_published(params, source)
    if any(not figure.same for figure in published):
        verdict.append(f"{source.origin} differs from what was published")
    duplicates, near_duplicates = group_duplicates(assigned, hashes), _near_duplicates(assigned, inspected, near)
    problems = []
    if source.origin not in PUBLISHED:
        reliable = [group for group in near_duplicates or [] if _large_enough(group, inspected)]
        for kind, groups in (("duplicates", [*duplicates.values()]), ("near duplicates", reliable)):
            problems += _cross_split_problem(kind, groups, source)
    label_maps = None
    if isinstance(source, LabelMapSource):
        label_maps = figures.label_map_figures(source.classes, assigned, inspected)
        verdict += figures.missing_classes(label_maps, params.prior.smoothing)
        remarks += figures.remarks(label_maps, params)
    return DataReport(
        source.origin, data.location, classes, assigned, inspected,
        {split: count_classes(rows, len(classes)) for split, rows in assigned.items()},
        bad, conflicts, duplicates, near_duplicates,
        hash_split(assigned), hash_split(assigned, hashes), published, verdict, problems, remarks, label_maps,
    )  # fmt: skip


def _source_problems(
    source: Source, data: DataParams, bad: list[Row], inspected: Mapping[str, InspectionResult]
) -> list[str]:
    """Errors of class names, images and taxonomy with which `split` would fail."""
    names = class_names_problem(source.classes)
    problems = [names] if names else []
    if bad and data.on_bad_image == "fail":
        problems.append(
            f"{counted(len(bad), 'image', 'are')} missing or cannot be used; the first: {inspected[bad[0].reference].problem}"
        )
        missing = [row for row in bad if inspected[row.reference].missing]
        if missing and (cause := source.why_missing(missing)):
            problems.append(cause)
    try:
        read_taxonomy_file(data.taxonomy, source.classes)
    except StageError as error:
        problems.append(str(error))
    return problems


def _conflict_problem(conflicts: list[tuple[Row, Row]], source: Source) -> str:
    row, other = conflicts[0]
    return f"{counted(len(conflicts), 'image')} with two labels; the first: {source.location(row)} and {source.location(other)}"


def _large_enough(group: list[tuple[str, Row]], inspected: Mapping[str, InspectionResult]) -> bool:
    """Whether all images of a group have at least 32 x 32 pixels, the input size of the perceptual hash.

    Smaller images are enlarged, and their hashes cannot distinguish them.
    """
    sizes = [inspected[row.reference] for _, row in group]
    return all(min(size.width, size.height) >= MIN_HASHED_SIDE for size in sizes)


def _cross_split_problem(kind: str, groups: list[list[tuple[str, Row]]], source: Source) -> list[str]:
    """A line on groups of duplicates with images in two splits, such as a test image that is in train; else empty."""
    shared = [group for group in groups if len({split for split, _ in group}) > 1]
    if not shared:
        return []
    (split, row), *others = shared[0]
    other, second = next(member for member in others if member[0] != split)
    return [
        f"{counted(len(shared), 'group')} of {kind} in two splits, so that figures on held-out images are too good; the first: "
        f"{source.location(row)} ({split}) and {source.location(second)} ({other}); keep each image in one split"
    ]


def count_classes(rows: list[Row], classes: int) -> list[int]:
    """Number of images of each class."""
    return np.bincount([row.label for row in rows], minlength=classes).tolist()


def hash_split(assigned: Assigned, hashes: Mapping[str, str] | None = None) -> str:
    """sha256 of split, sample id and label of all images, independent of order; with `hashes` also of their bytes."""
    lines = sorted(
        f"{split}\t{row.sample_id}\t{row.label}\t{hashes.get(row.reference, '') if hashes is not None else ''}\n"
        for split, rows in assigned.items()
        for row in rows
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def compare_with_published(params: Params, source: Source) -> list[PublishedFigure]:
    """Compare the source with the published figures of a known data set; empty for other data sets."""
    expected = PUBLISHED.get(source.origin)
    if expected is None:
        return []
    by_split = {split: [row for row in source.rows if row.split == split] for split in expected.images}
    counts = count_classes(by_split["train"], len(source.classes))
    groups = [shot_group(count) for count in counts]
    numbers = [(f"{split} images", expected.images[split], len(rows)) for split, rows in by_split.items()]
    numbers += [
        ("classes", expected.classes, len(source.classes)),
        ("largest class", expected.largest, max(counts)),
        ("smallest class", expected.smallest, min(counts)),
        *((f"{group} classes", expected.groups[group], groups.count(group)) for group in GROUPS),
    ]
    figures = [PublishedFigure(name, f"{published:,}", f"{measured:,}") for name, published, measured in numbers]
    choice = published_choice(source.origin, params.data)
    if choice:
        labels, data = np.array([row.label for row in by_split["train"]]), params.data
        chosen = choose_images(labels, class_sizes(data.profile, counts, data.imbalance_factor), data.seed)
        published = f"{counted(choice[0], 'image')}, {choice[1]}"
        measured = f"{counted(sum(map(len, chosen)), 'image')}, {hash_of_ranks(labels, chosen)}"
        figures.append(PublishedFigure(f"CIFAR-LT, factor {data.imbalance_factor:g}", published, measured))
    return figures


def _near_duplicates(
    assigned: Assigned, inspected: Mapping[str, InspectionResult], distance: int | None
) -> list[list[tuple[str, Row]]] | None:
    if distance is None:
        return None
    members = [(split, row) for split, rows in assigned.items() for row in rows]
    groups = group_near_duplicates([inspected[row.reference].perceptual_hash for _, row in members], distance)
    # Byte-identical images are reported as exact duplicates.
    return [
        [members[i] for i in group]
        for group in groups
        if len({inspected[members[i][1].reference].sha256 for i in group}) > 1
    ]

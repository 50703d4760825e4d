"""Check the rows of a drop: each image must decode, have a known class, be new, and be in no held-out split."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from models.preprocess import ImageError
from models.prior import class_key
from pipeline.data.inspection import decode_checked
from pipeline.data.split_tables import read_split
from pipeline.ingestion.drop_folder import DropRow
from pipeline.params import IngestParams
from pipeline.shared.artifacts import SPLIT
from pipeline.shared.errors import DataError
from pipeline.shared.progress import progress_bar
from pipeline.sources import BadImageError, Ingested, in_parts

MAX_NAME = 200  # characters of a class name


@dataclass(frozen=True)
class CheckedRow:
    """Result of the check of one row. sha256: of its bytes, empty if unreadable. label: class name, None if unknown.

    outcome: `good`, `existing` (a training row has the same image and label) or `bad`. reason: the kind of problem in
    one or two words. detail: the problem as a text for the message.
    """

    row: DropRow
    outcome: str
    sha256: str = ""
    label: str | None = None
    reason: str = ""
    detail: str = ""


def check_rows(rows: list[DropRow], params: IngestParams, classes: list[str], ingested: Ingested) -> list[CheckedRow]:
    """Check all rows and return one result per row, in the same order.

    Each image is read and decoded once, in parallel, with a progress bar. classes: existing class names, in label
    order. Raises ParamsError if there is no split, because the held-out images are then not known.
    """
    images = _read_images(rows)
    class_names = set(classes)
    by_number = not any(map(str.isdecimal, classes))
    labels = [_class_of(row.label, params, classes, class_names, by_number) for row in rows]
    existing = _existing_images({image.sha256 for image in images if image.sha256}, classes, ingested)
    drop_labels: dict[str, set[str]] = defaultdict(set)
    for image, (label, _) in zip(images, labels, strict=True):
        if label is not None and image.outcome == "good":
            drop_labels[image.sha256].add(label)
    results, added = [], set()
    for image, (label, label_problem) in zip(images, labels, strict=True):
        result = replace(image, label=label)
        if image.outcome == "good":
            result = _check_label(result, label_problem, existing[image.sha256], drop_labels[image.sha256])
        if result.outcome == "good" and result.sha256 in added:
            result = replace(result, outcome="existing")
        added.add(result.sha256 if result.outcome == "good" else "")
        results.append(result)
    return results


def _check_label(
    image: CheckedRow, label_problem: tuple[str, str], existing: list[tuple[str, str]], drop_labels: set[str]
) -> CheckedRow:
    """Compare the label of a readable image with the data set and the drop.

    existing: (split, class) pairs of the equal images in the data set. drop_labels: labels of the image in the drop.
    """

    def bad(reason: str, detail: str) -> CheckedRow:
        return replace(image, outcome="bad", reason=reason, detail=detail)

    if image.label is None:
        return bad(*label_problem)
    for held_out in ("test", "validation"):
        if held_out in {split for split, _ in existing}:
            return bad(f"in {held_out}", f"is an image of the {held_out} split")
    train_labels = {name for _, name in existing}
    if image.label in train_labels:
        return replace(image, outcome="existing")
    if other_labels := sorted((train_labels | drop_labels) - {image.label}):
        where = "a training image" if train_labels else "in this drop too"
        return bad("two labels", f"is {where} labelled {other_labels[0]!r}")
    return image


def _read_images(rows: list[DropRow]) -> list[CheckedRow]:
    pool = ThreadPoolExecutor((os.cpu_count() or 1) + 4)
    results: list[CheckedRow] = []
    try:
        with progress_bar(unit="images") as bar:
            task = bar.add_task("ingest: reading images", total=len(rows), rate="")
            for part in pool.map(lambda part: [_read_image(row) for row in part], in_parts(rows, 64)):
                results += part
                bar.advance(task, len(part))
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def _read_image(row: DropRow) -> CheckedRow:
    if row.problem:
        return CheckedRow(row, "bad", "", None, *row.problem)
    try:
        data = row.read()
    except BadImageError as error:
        return CheckedRow(row, "bad", "", None, "unreadable", str(error))
    except DataError as error:
        return CheckedRow(row, "bad", "", None, "table", str(error))
    digest = hashlib.sha256(data).hexdigest()
    try:
        decode_checked(data)
    except ImageError as error:
        return CheckedRow(row, "bad", digest, None, error.kind, str(error))
    return CheckedRow(row, "good", digest)


def _class_of(
    label: str | int | None, params: IngestParams, classes: list[str], class_names: set[str], by_number: bool
) -> tuple[str | None, tuple[str, str]]:
    """Class name of a label, by name or, if no name of a class is a number, by number; else None with the reason.

    class_names: set of the classes, for fast lookup. by_number: whether an integer is the number of a class.
    """
    if label is None or label == "":
        return None, ("no label", "has no label that is text or an integer")
    name = class_key(str(label))
    if name in class_names:
        return name, ("", "")
    if isinstance(label, int) and by_number:
        if 0 <= label < len(classes):
            return classes[label], ("", "")
        return None, ("unknown class", f"has the label {label}; expected 0 to {len(classes) - 1}, or a class's name")
    if params.new_classes == "accept" or (
        isinstance(params.new_classes, list) and name in map(class_key, params.new_classes)
    ):
        if name.isprintable() and name.strip() == name and len(name) <= MAX_NAME:
            return name, ("", "")
        return None, ("class name", f"has the label {name[:40]!r}; expected printable text without spaces around it")
    return None, (
        "unknown class",
        f"has the label {name[:MAX_NAME]!r}, which is no class; correct it, or name it in ingest.new_classes",
    )


def _existing_images(digests: set[str], classes: list[str], ingested: Ingested) -> dict[str, list[tuple[str, str]]]:
    """Map each sha256 to the (split, class) pairs of the images in the data set that have it."""
    existing: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in ("train", "validation", "test"):
        table = read_split(name, ["sha256", "label"], SPLIT, [("sha256", "in", sorted(digests) or [""])])
        for digest, label in zip(*(table.column(column).to_pylist() for column in ("sha256", "label")), strict=True):
            existing[digest].append((name, classes[label]))
    for digest, label in ingested.content():
        if digest in digests:
            existing[digest].append(("train", label))
    return existing


def count_reasons(rows: Sequence[CheckedRow]) -> dict[str, int]:
    """Number of bad rows by reason, most frequent first."""
    return dict(Counter(row.reason for row in rows if row.outcome == "bad").most_common())

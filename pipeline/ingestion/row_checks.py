"""Check the rows of a drop: each image must decode, have a known class, be new, and be in no held-out split."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

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

LONGEST_NAME = 200  # characters of a class name


@dataclass(frozen=True)
class Verdict:
    """Result of the check of one row. sha256: of its bytes, empty if unreadable. label: class name, None if unknown.

    outcome: `good`, `there` (a training row has the same image and label already) or `bad`. reason: the kind of problem
    in one or two words. detail: the problem as a text for the message.
    """

    row: DropRow
    outcome: str
    sha256: str = ""
    label: str | None = None
    reason: str = ""
    detail: str = ""


@dataclass(frozen=True)
class _Read:
    sha256: str = ""
    reason: str = ""
    detail: str = ""


def judge(
    rows: list[DropRow], params: IngestParams, classes: list[str], ingested: Ingested, split: Path = SPLIT
) -> list[Verdict]:
    """Check all rows and return one verdict per row, in the same order.

    Each image is read and decoded once, in parallel, with a progress bar. classes: existing class names, in label
    order. Raises ParamsError if there is no split, because the held-out images are then not known.
    """
    read = _read_all(rows)
    known = set(classes)
    labels = [_class_of(row.label, params, classes, known) for row in rows]
    places = _places({found.sha256 for found in read if found.sha256}, classes, ingested, split)
    claims: dict[str, set[str]] = defaultdict(set)
    for found, (label, _) in zip(read, labels, strict=True):
        if label is not None and not found.reason:
            claims[found.sha256].add(label)
    verdicts, taken = [], set()
    for row, found, (label, unusable) in zip(rows, read, labels, strict=True):
        verdict = _judge_one(row, found, label, unusable, places[found.sha256], claims[found.sha256])
        if verdict.outcome == "good" and verdict.sha256 in taken:
            verdict = Verdict(row, "there", found.sha256, label)
        taken.add(verdict.sha256 if verdict.outcome == "good" else "")
        verdicts.append(verdict)
    return verdicts


def _judge_one(
    row: DropRow,
    found: _Read,
    label: str | None,
    unusable: tuple[str, str],
    places: list[tuple[str, str]],
    claims: set[str],
) -> Verdict:
    def bad(reason: str, detail: str) -> Verdict:
        return Verdict(row, "bad", found.sha256, label, reason, detail)

    if found.reason:
        return bad(found.reason, found.detail)
    if label is None:
        return bad(*unusable)
    for held in ("test", "validation"):
        if held in {split for split, _ in places}:
            return bad(f"in {held}", f"is an image of the {held} split")
    trained = {name for _, name in places}
    if label in trained:
        return Verdict(row, "there", found.sha256, label)
    if others := sorted((trained | claims) - {label}):
        where = "a training image" if trained else "in this drop too"
        return bad("two labels", f"is {where} labelled {others[0]!r}")
    return Verdict(row, "good", found.sha256, label)


def _read_all(rows: list[DropRow]) -> list[_Read]:
    pool = ThreadPoolExecutor((os.cpu_count() or 1) + 4)
    results: list[_Read] = []
    try:
        with progress_bar(unit="images") as bar:
            task = bar.add_task("ingest: reading images", total=len(rows), rate="")
            for part in pool.map(lambda part: [_read(row) for row in part], in_parts(rows, 64)):
                results += part
                bar.advance(task, len(part))
    finally:
        pool.shutdown(cancel_futures=True)
    return results


def _read(row: DropRow) -> _Read:
    if row.problem:
        return _Read("", *row.problem)
    try:
        data = row.read()
    except BadImageError as error:
        return _Read("", "unreadable", str(error))
    except DataError as error:
        return _Read("", "table", str(error))
    digest = hashlib.sha256(data).hexdigest()
    try:
        decode_checked(data)
    except ImageError as error:
        return _Read(digest, error.kind, str(error))
    return _Read(digest)


def _class_of(
    label: str | int | None, params: IngestParams, classes: list[str], known: set[str]
) -> tuple[str | None, tuple[str, str]]:
    """Class name of a label, by name or, if no class has that name, by number; else None with the reason.

    known: set of the classes, for fast lookup.
    """
    if label is None or label == "":
        return None, ("no label", "has no label that is text or an integer")
    name = class_key(str(label))
    if name in known:
        return name, ("", "")
    if isinstance(label, int):
        if 0 <= label < len(classes):
            return classes[label], ("", "")
        return None, ("unknown class", f"has the label {label}; expected 0 to {len(classes) - 1}, or a class's name")
    if params.new_classes == "accept" or (
        isinstance(params.new_classes, list) and name in map(class_key, params.new_classes)
    ):
        if name.isprintable() and name.strip() == name and len(name) <= LONGEST_NAME:
            return name, ("", "")
        return None, ("class name", f"has the label {name[:40]!r}; expected printable text without spaces around it")
    return None, (
        "unknown class",
        f"has the label {name[:LONGEST_NAME]!r}, which is no class; correct it, or name it in ingest.new_classes",
    )


def _places(digests: set[str], classes: list[str], ingested: Ingested, split: Path) -> dict[str, list[tuple[str, str]]]:
    """Map each sha256 to the (split, class) pairs of the images in the data set that have it."""
    places: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in ("train", "validation", "test"):
        table = read_split(name, ["sha256", "label"], split, [("sha256", "in", sorted(digests) or [""])])
        for digest, label in zip(*(table.column(column).to_pylist() for column in ("sha256", "label")), strict=True):
            places[digest].append((name, classes[label]))
    for digest, label in ingested.content():
        if digest in digests:
            places[digest].append(("train", label))
    return places


def reasons(verdicts: Sequence[Verdict]) -> dict[str, int]:
    """Number of bad rows by reason, most frequent first."""
    return dict(Counter(verdict.reason for verdict in verdicts if verdict.outcome == "bad").most_common())

"""Stage `split`: which image is for training, validation and test; writes data/split/."""

from __future__ import annotations

import csv
import hashlib
import io
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from models.preprocess import ImageError, decode
from pipeline.artifacts import SPLIT, whole_folder, write_file, write_json
from pipeline.errors import DataError, ParamsError
from pipeline.params import DataParams, Params
from pipeline.profiles import choose, class_sizes
from pipeline.published import check_published_choice
from pipeline.sources import Row, Source, open_source
from pipeline.stage import stage_main

SPLITS = ("train", "validation", "test")
SCHEMA = pa.schema(
    [("sample_id", pa.string()), ("label", pa.int32()), ("reference", pa.string()), ("sha256", pa.string())]
)


@dataclass(frozen=True)
class Result:
    """What the split holds."""

    sizes: dict[str, int]
    classes: int
    duplicates: int
    output: Path

    def __str__(self) -> str:
        sizes = ", ".join(f"{self.sizes[split]:,} {split}" for split in SPLITS)
        return f"{self.classes} classes; {sizes}; {self.duplicates} images shared by splits → {self.output}"


def run(params: Params, output: Path = SPLIT) -> Result:
    """Assign every image of the source to a split (or to none), check that each decodes, and write the tables.

    Raises DataError for an unusable image, for one image under two labels and for a class too small to hold out from.
    """
    source = open_source(params.data)
    hashes = hash_images(source)
    check_labels(source, hashes)
    assigned = assign(source.rows, source.classes, params.data)
    check_images(source, [row for rows in assigned.values() for row in rows])
    shared = find_duplicates(assigned, hashes, source.classes)
    with whole_folder(output) as folder:
        for split, rows in assigned.items():
            columns = [[row.sample_id for row in rows], [row.label for row in rows], [row.reference for row in rows]]
            table = pa.table([*columns, [hashes[row.reference] for row in rows]], schema=SCHEMA)
            pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
        write_json(folder / "classes.json", source.classes)
        write_file(folder / "duplicates.csv", _as_csv(["sha256", "split", "sample_id", "class"], shared))
    groups = {entry[0] for entry in shared}
    if groups:
        print(f"split: {len(groups)} images are in more than one split; see {output}/duplicates.csv", file=sys.stderr)
    return Result({split: len(rows) for split, rows in assigned.items()}, len(source.classes), len(groups), output)


def assign(rows: list[Row], classes: list[str], params: DataParams) -> dict[str, list[Row]]:
    """Rows of each split, from the source's hints and params.data. Rows that the profile drops are in no split.

    Test is held out first (unless the source brings one), then the profile picks what training keeps, then validation
    is held out (unless the source brings one): validation_per_class images, from those that the profile dropped and,
    where they do not suffice, at most validation_share of what the class keeps.
    """
    hinted = {split: [row for row in rows if row.split == split] for split in SPLITS}
    pool, test = hinted["train"], hinted["test"]
    generator = np.random.default_rng(params.seed)
    if not test:
        pool, test = _hold_out_test(pool, classes, params.test_per_class, generator)
    labels = np.array([row.label for row in pool])
    available = np.bincount(labels, minlength=len(classes)).tolist()
    try:
        sizes = class_sizes(params.profile, available, params.imbalance_factor)
    except ValueError as error:
        raise ParamsError(f"data.{error}") from None
    kept = choose(labels, sizes, params.seed)
    check_published_choice(params, labels, kept)
    validation = hinted["validation"]
    if not validation:
        dropped = [np.setdiff1d(np.flatnonzero(labels == c), chosen) for c, chosen in enumerate(kept)]
        kept, held = _hold_out_validation(kept, dropped, params, generator)
        validation = [pool[i] for i in held]
    train = [pool[i] for chosen in kept for i in chosen]
    return {"train": train, "validation": validation, "test": test}


def _hold_out_test(
    pool: list[Row], classes: list[str], per_class: int, generator: np.random.Generator
) -> tuple[list[Row], list[Row]]:
    labels = np.array([row.label for row in pool])
    held: list[int] = []
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels == label)
        if len(members) <= per_class:
            raise DataError(
                f"class {name!r} has {len(members)} images, too few to hold out data.test_per_class = {per_class} and train; "
                "lower it, add images, or give the source a test split"
            )
        held.extend(sorted(generator.permutation(members)[:per_class].tolist()))
    out = set(held)
    return [row for i, row in enumerate(pool) if i not in out], [pool[i] for i in held]


def _hold_out_validation(
    kept: list[np.ndarray], dropped: list[np.ndarray], params: DataParams, generator: np.random.Generator
) -> tuple[list[np.ndarray], list[int]]:
    remaining, held = [], []
    for chosen, spare in zip(kept, dropped, strict=True):
        free = generator.permutation(spare)[: params.validation_per_class]
        wanted = min(
            params.validation_per_class - len(free), int(params.validation_share * len(chosen)), len(chosen) - 1
        )
        taken = generator.permutation(chosen)[:wanted] if wanted > 0 else chosen[:0]
        remaining.append(chosen[~np.isin(chosen, taken)])
        held.extend(sorted([*free.tolist(), *taken.tolist()]))
    return remaining, held


def hash_images(source: Source) -> dict[str, str]:
    """sha256 of every image of the source, by reference. Raises DataError naming a file that cannot be read."""
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda row: hashlib.sha256(source.read(row.reference)).hexdigest(), source.rows)
        return {row.reference: digest for row, digest in zip(source.rows, digests, strict=True)}


def check_labels(source: Source, hashes: dict[str, str]) -> None:
    """Raise DataError when an image lies under two labels: no classifier can learn both, nor be tested on both.

    Looked at before anything is held out, so that it does not depend on a seed. Splits that the source itself brings
    are compared apart: published data sets hold such pairs, and `find_duplicates` reports them.
    """
    first: dict[tuple[str, str], Row] = {}
    for row in source.rows:
        other = first.setdefault((row.split, hashes[row.reference]), row)
        if other.label != row.label:
            raise DataError(
                f"{source.place(row)} and {source.place(other)} are the same image, labelled {source.classes[row.label]!r} "
                f"and {source.classes[other.label]!r}; keep one of them"
            )


def check_images(source: Source, rows: list[Row]) -> None:
    """Decode each image once. Raises DataError naming the first one that fails."""

    def check(row: Row) -> None:
        try:
            decode(source.read(row.reference))
        except ImageError as error:
            raise DataError(f"{source.place(row)}: {error}; replace the image or remove it") from None

    with ThreadPoolExecutor() as pool:
        for _ in pool.map(check, rows):
            pass


def find_duplicates(
    assigned: dict[str, list[Row]], hashes: dict[str, str], classes: list[str]
) -> list[tuple[str, str, str, str]]:
    """Byte-identical images found in more than one split, as (sha256, split, sample id, class)."""
    places: dict[str, list[tuple[str, Row]]] = defaultdict(list)
    for split, rows in assigned.items():
        for row in rows:
            places[hashes[row.reference]].append((split, row))
    return [
        (digest, split, row.sample_id, classes[row.label])
        for digest, found in sorted(places.items())
        if len({split for split, _ in found}) > 1
        for split, row in found
    ]


def _as_csv(header: list[str], rows: list[tuple[str, ...]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return stream.getvalue()


if __name__ == "__main__":
    sys.exit(stage_main(run, "Split the source into training, validation and test."))

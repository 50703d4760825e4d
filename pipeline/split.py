"""Stage `split`: which image is for training, validation and test; writes data/split/."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from models.prior import class_names_problem
from pipeline.artifacts import INGESTED, SPLIT, as_csv, whole_folder, write_file, write_json
from pipeline.duplicates import check_labels, conflicting_labels, find_duplicates
from pipeline.errors import DataError, ParamsError, StageError
from pipeline.inspection import check_missing, check_usable, inspect_images
from pipeline.params import DataParams, Params
from pipeline.profiles import choose, class_members, class_sizes, test_size, validation_size
from pipeline.published import PUBLISHED, check_published_choice
from pipeline.sources import Row, Source, WithIngested, open_source
from pipeline.stage import stage_main
from serving.terminal import counted, print

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
    skipped: int
    ingested: int
    output: Path

    def __str__(self) -> str:
        sizes = ", ".join(f"{self.sizes[split]:,} {split}" for split in SPLITS)
        skipped = f"{counted(self.skipped, 'image')} left out; " if self.skipped else ""
        ingested = f"{self.ingested:,} of the training images taken in; " if self.ingested else ""
        shared = f"{counted(self.duplicates, 'image')} shared by splits"
        return f"{counted(self.classes, 'class')}; {sizes}; {ingested}{skipped}{shared} → {self.output}"


def run(params: Params, output: Path = SPLIT) -> Result:
    """Assign every image of the source to a split (or to none), check that each decodes, and write the tables.

    Images that were taken in (`tailor ingest`) follow in the training split, which alone they change.
    With data.on_bad_image fail, raises DataError for missing images and for unusable ones of any split; with skip they are
    left out before anything is assigned, counted, and listed in skipped.csv. Raises DataError for one image under two
    labels (a published data set keeps such pairs, so that results compare) and for a class too small to hold out from;
    StageError when an ingest placed a shard meanwhile.
    """
    shards = _taken_in()
    everything = open_source(params.data)
    everything.check()
    if problem := class_names_problem(everything.classes):
        raise DataError(f"{params.data.location}: {problem}")
    source = everything.own
    skip = params.data.on_bad_image == "skip"
    if not skip:
        check_missing(source)
    inspected = inspect_images(source, "split")
    hashes = {reference: found.sha256 for reference, found in inspected.items() if found.sha256}
    skipped = [row for row in source.rows if inspected[row.reference].problem] if skip else []
    rows = without(source, skipped)
    if source.origin not in PUBLISHED:
        check_labels(source, {row.reference: hashes[row.reference] for row in rows if row.reference in hashes})
    elif pairs := conflicting_labels(rows, hashes):
        print(
            f"split: {counted(len(pairs), 'image', 'lie')} under two labels; kept, as {source.origin} is published",
            file=sys.stderr,
        )
    assigned = assign(rows, source.classes, params.data, source.origin)
    taken = [inspected[row.reference].problem for kept in assigned.values() for row in kept]
    check_usable([problem for problem in taken if problem], len(taken))
    ingested, known = new_images(everything, assigned, hashes)
    left_out = [(row, str(inspected[row.reference].problem)) for row in skipped] + known
    assigned["train"] = assigned["train"] + ingested
    hashes |= everything.ingested_hashes
    shared = find_duplicates(assigned, hashes, everything.classes)
    if _taken_in() != shards:  # DVC hashes the folder when the stage has ended, and would never run it for that shard
        raise StageError(f"{INGESTED} changed while split ran; run `dvc repro` again")
    _write(output, assigned, hashes, everything.classes, shared, left_out)
    groups = {entry[0] for entry in shared}
    if groups:
        several = counted(len(groups), "image", "are")
        print(f"split: {several} in more than one split; see {output}/duplicates.csv", file=sys.stderr)
    if skipped:
        print(
            f"split: {len(skipped):,} of {counted(len(source.rows), 'image')} cannot be used and were left out; see "
            f"{output}/skipped.csv",
            file=sys.stderr,
        )
    if known:
        print(
            f"split: {counted(len(known), 'ingested image', 'are')} in a split of the source already; see {output}/skipped.csv",
            file=sys.stderr,
        )
    sizes = {split: len(kept) for split, kept in assigned.items()}
    return Result(sizes, len(everything.classes), len(groups), len(skipped), len(ingested), output)


def _taken_in() -> list[str]:
    return sorted(path.name for path in INGESTED.glob("*.parquet"))


def new_images(
    source: WithIngested, assigned: dict[str, list[Row]], hashes: dict[str, str]
) -> tuple[list[Row], list[tuple[Row, str]]]:
    """Images taken in that no split of the source holds, and those that one does, each with which.

    `tailor ingest` lets none of the latter in; but another seed, or more images in the source, moves what is held out.
    """
    place = {hashes[row.reference]: split for split in reversed(SPLITS) for row in assigned[split]}
    digests = source.ingested_hashes
    new = [row for row in source.ingested if digests[row.reference] not in place]
    known = [row for row in source.ingested if digests[row.reference] in place]
    return new, [(row, f"is in {place[digests[row.reference]]} already") for row in known]


def _write(
    output: Path,
    assigned: dict[str, list[Row]],
    hashes: dict[str, str],
    classes: list[str],
    shared: list[tuple[str, str, str, str]],
    left_out: list[tuple[Row, str]],
) -> None:
    with whole_folder(output) as folder:
        for split, kept in assigned.items():
            columns = [[row.sample_id for row in kept], [row.label for row in kept], [row.reference for row in kept]]
            table = pa.table([*columns, [hashes[row.reference] for row in kept]], schema=SCHEMA)
            pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
        write_json(folder / "classes.json", classes)
        write_file(folder / "duplicates.csv", as_csv(shared, ["sha256", "split", "sample_id", "class"]))
        reasons = [(row.split, row.sample_id, classes[row.label], problem) for row, problem in left_out]
        write_file(folder / "skipped.csv", as_csv(reasons, ["split", "sample_id", "class", "problem"]))


def without(source: Source, skipped: list[Row]) -> list[Row]:
    """The source's rows less some. Raises DataError when a class has no training image left."""
    out = {row.reference for row in skipped}
    rows = [row for row in source.rows if row.reference not in out]
    left = {row.label for row in rows if row.split == "train"}
    empty = [name for label, name in enumerate(source.classes) if label not in left]
    if empty:
        raise DataError(
            f"class {empty[0]!r} has no usable training image (such classes: {len(empty)}; "
            f"{counted(len(skipped), 'image')} left "
            "out by data.on_bad_image: skip); `tailor data check` lists the images"
        )
    return rows


def assign(rows: list[Row], classes: list[str], params: DataParams, origin: str = "") -> dict[str, list[Row]]:
    """Rows of each split, from the source's hints and params.data. Rows that the profile drops are in no split.

    Test is held out first (unless the source brings one): `profiles.test_size` images of each class. Then each class is cut
    to max_per_class images. Then the profile picks what training keeps. Then validation is held out (unless the source
    brings one): validation_per_class images, from those that the profile dropped and, where they do not suffice, at most
    validation_share of what the class keeps. What the profile picks from a data set of known origin is held against the
    published choice.
    """
    hinted = {split: [row for row in rows if row.split == split] for split in SPLITS}
    pool, test = hinted["train"], hinted["test"]
    generator = np.random.default_rng(params.seed)
    if not test:
        pool, test = _hold_out_test(pool, classes, params, generator)
    if params.max_per_class:
        labels = np.array([row.label for row in pool])
        chosen = choose(labels, [params.max_per_class] * len(classes), params.seed)
        pool = [pool[i] for i in np.sort(np.concatenate(chosen))]
    labels = np.array([row.label for row in pool])
    available = np.bincount(labels, minlength=len(classes)).tolist()
    try:
        sizes = class_sizes(params.profile, available, params.imbalance_factor)
    except ValueError as error:
        raise ParamsError(f"data.{error}") from None
    kept = choose(labels, sizes, params.seed)
    check_published_choice(origin, params, labels, kept)
    validation = hinted["validation"]
    if not validation:
        members = class_members(labels, len(classes))
        dropped = [np.setdiff1d(found, chosen) for found, chosen in zip(members, kept, strict=True)]
        kept, held = _hold_out_validation(kept, dropped, params, generator)
        validation = [pool[i] for i in held]
    train = [pool[i] for chosen in kept for i in chosen]
    return {"train": train, "validation": validation, "test": test}


def _hold_out_test(
    pool: list[Row], classes: list[str], params: DataParams, generator: np.random.Generator
) -> tuple[list[Row], list[Row]]:
    labels = np.array([row.label for row in pool])
    held: list[int] = []
    for name, members in zip(classes, class_members(labels, len(classes)), strict=True):
        size = test_size(len(members), params.test_per_class, params.test_share)
        if not size or len(members) <= size:
            raise DataError(
                f"class {name!r} has {counted(len(members), 'image')}, too few to hold out data.test_per_class "
                f"= {size or 1} and train; "
                f"{'lower it, ' if size > 1 else ''}add images, or give the source a test split"
            )
        held.extend(sorted(generator.permutation(members)[:size].tolist()))
    out = set(held)
    return [row for i, row in enumerate(pool) if i not in out], [pool[i] for i in held]


def _hold_out_validation(
    kept: list[np.ndarray], dropped: list[np.ndarray], params: DataParams, generator: np.random.Generator
) -> tuple[list[np.ndarray], list[int]]:
    remaining, held = [], []
    for chosen, spare in zip(kept, dropped, strict=True):
        free = generator.permutation(spare)[: params.validation_per_class]
        wanted = validation_size(len(chosen), len(spare), params.validation_per_class, params.validation_share)
        taken = generator.permutation(chosen)[:wanted] if wanted > 0 else chosen[:0]
        remaining.append(chosen[~np.isin(chosen, taken)])
        held.extend(sorted([*free.tolist(), *taken.tolist()]))
    return remaining, held


if __name__ == "__main__":
    sys.exit(stage_main(run, "Split the source into training, validation and test."))

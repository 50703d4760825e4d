"""Stage `split`: assign images to training, validation and test; writes data/split/."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from models.prior import class_names_problem
from pipeline.command_line import stage_main
from pipeline.data.assignment import SPLITS, assign, without
from pipeline.data.duplicates import check_labels, conflicting_labels, find_duplicates
from pipeline.data.inspection import InspectionResult, check_missing, check_usable, inspect_images
from pipeline.data.published import PUBLISHED
from pipeline.params import Params
from pipeline.shared.artifacts import INGESTED, SPLIT, as_csv, whole_folder, write_file, write_json
from pipeline.shared.errors import DataError, StageError
from pipeline.sources import Row, SourceWithIngested, open_source
from serving.shared.terminal import counted, print

SCHEMA = pa.schema(
    [("sample_id", pa.string()), ("label", pa.int32()), ("reference", pa.string()), ("sha256", pa.string())]
)
# Further columns of task segmentation, whose label is always 0: pixels of each class in the label map.
LABEL_MAP_FIELDS = [pa.field("pixels", pa.list_(pa.int64())), pa.field("label_map_sha256", pa.string())]


@dataclass(frozen=True)
class Result:
    """Numbers of images and classes of a split."""

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
    """Assign every image of the source to a split (or to none), check that each can be decoded, and write the tables.

    Ingested images (`tailor ingest`) are appended to the training split and change no other split. With
    data.on_bad_image `fail`, raises DataError for missing images and for unusable ones of any split. With `skip` they
    are excluded before the assignment, counted, and listed in skipped.csv. Raises DataError for an image with two
    labels (a published data set keeps such pairs, so that results are comparable) and for a class too small to hold
    images out; StageError when an ingest adds a shard during the stage. For task segmentation, all images count as one
    class, and an image without a usable label map is unusable.
    """
    shards = _ingested_shards()
    everything = open_source(params.data)
    everything.shards.check()
    if problem := class_names_problem(everything.classes):
        raise DataError(f"{params.data.location}: {problem}")
    source = everything.base
    if params.data.label_map and shards:
        raise DataError(
            f"{INGESTED}: holds ingested images, which have no label maps; move them away for task segmentation"
        )
    image_classes = ["images"] if params.data.label_map else everything.classes
    skip = params.data.on_bad_image == "skip"
    if not skip:
        check_missing(source)
    inspected = inspect_images(source, "split")
    hashes = {reference: image.sha256 for reference, image in inspected.items() if image.sha256}
    skipped = [row for row in source.rows if inspected[row.reference].problem] if skip else []
    rows = without(source, skipped, image_classes)
    if source.origin not in PUBLISHED:
        check_labels(source, {row.reference: hashes[row.reference] for row in rows if row.reference in hashes})
    elif pairs := conflicting_labels(rows, hashes):
        print(
            f"split: {counted(len(pairs), 'image', 'lie')} under two labels; kept, as {source.origin} is published",
            file=sys.stderr,
        )
    assigned = assign(rows, image_classes if params.data.label_map else source.classes, params.data, source.origin)
    problems = [inspected[row.reference].problem for rows in assigned.values() for row in rows]
    check_usable([problem for problem in problems if problem], len(problems))
    ingested, already_held = new_images(everything, assigned, hashes)
    excluded = [(row, str(inspected[row.reference].problem)) for row in skipped] + already_held
    assigned["train"] = assigned["train"] + ingested
    hashes |= everything.ingested_hashes
    shared = find_duplicates(assigned, hashes, image_classes)
    if _ingested_shards() != shards:  # DVC hashes the folder only after the stage, and would not run the stage again
        raise StageError(f"{INGESTED} changed while split ran; run `dvc repro` again")
    label_maps = inspected if params.data.label_map else None
    reasons = [(row.split, row.sample_id, image_classes[row.label], problem) for row, problem in excluded]
    _write(output, assigned, hashes, everything.classes, shared, reasons, label_maps)
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
    if already_held:
        print(
            f"split: {counted(len(already_held), 'ingested image', 'are')} in a split of the source already; "
            f"see {output}/skipped.csv",
            file=sys.stderr,
        )
    sizes = {split: len(rows) for split, rows in assigned.items()}
    return Result(sizes, len(everything.classes), len(groups), len(skipped), len(ingested), output)


def _ingested_shards() -> list[str]:
    return sorted(path.name for path in INGESTED.glob("*.parquet"))


def new_images(
    source: SourceWithIngested, assigned: dict[str, list[Row]], hashes: dict[str, str]
) -> tuple[list[Row], list[tuple[Row, str]]]:
    """Ingested images that are in no split of the source, and those that are in one, with the split's name.

    `tailor ingest` rejects the latter, but another seed or more images in the source change which images are held out.
    """
    split_of = {hashes[row.reference]: split for split in reversed(SPLITS) for row in assigned[split]}
    digests = source.ingested_hashes
    new = [row for row in source.ingested if digests[row.reference] not in split_of]
    duplicates = [row for row in source.ingested if digests[row.reference] in split_of]
    return new, [(row, f"is in {split_of[digests[row.reference]]} already") for row in duplicates]


def _write(
    output: Path,
    assigned: dict[str, list[Row]],
    hashes: dict[str, str],
    classes: list[str],
    shared: list[tuple[str, str, str, str]],
    reasons: list[tuple[str, str, str, str]],
    label_maps: dict[str, InspectionResult] | None,
) -> None:
    with whole_folder(output) as folder:
        for split, rows in assigned.items():
            columns = [[row.sample_id for row in rows], [row.label for row in rows], [row.reference for row in rows]]
            table = pa.table([*columns, [hashes[row.reference] for row in rows]], schema=SCHEMA)
            for field in LABEL_MAP_FIELDS if label_maps is not None else ():
                values = [getattr(label_maps[row.reference], field.name) for row in rows]
                table = table.append_column(field, pa.array(values, field.type))
            pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
        write_json(folder / "classes.json", classes)
        write_file(folder / "duplicates.csv", as_csv(shared, ["sha256", "split", "sample_id", "class"]))
        write_file(folder / "skipped.csv", as_csv(reasons, ["split", "sample_id", "class", "problem"]))


if __name__ == "__main__":
    sys.exit(stage_main(run, "Split the source into training, validation and test."))

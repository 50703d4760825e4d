"""Stage `split`: assign images to training, validation and test; writes data/split/."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from models.prior import class_names_problem
from models.taxonomy import Taxonomy
from pipeline.command_line import stage_main
from pipeline.data.assignment import SPLITS, assign, without
from pipeline.data.duplicates import check_labels, conflicting_labels, find_duplicates
from pipeline.data.groups import ImageGroups, group_remarks, hash_function, image_groups, ingested_groups
from pipeline.data.inspection import InspectionResult, check_missing, check_usable, inspect_images
from pipeline.data.published import PUBLISHED
from pipeline.data.split_tables import GROUP, TAXONOMY, read_taxonomy_file
from pipeline.params import Params
from pipeline.shared.artifacts import INGESTED, SPLIT, as_csv, whole_folder, write_file, write_json
from pipeline.shared.errors import DataError, StageError
from pipeline.sources import Row, Source, SourceWithIngested, open_source
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
    groups: int = 0

    def __str__(self) -> str:
        sizes = ", ".join(f"{self.sizes[split]:,} {split}" for split in SPLITS)
        skipped = f"{counted(self.skipped, 'image')} left out; " if self.skipped else ""
        ingested = f"{self.ingested:,} of the training images taken in; " if self.ingested else ""
        shared = f"{counted(self.duplicates, 'image')} shared by splits"
        groups = f"; {counted(self.groups, 'group')} of images" if self.groups else ""
        return f"{counted(self.classes, 'class')}; {sizes}; {ingested}{skipped}{shared}{groups} → {self.output}"


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
    taxonomy = read_taxonomy_file(params.data.taxonomy, everything.classes)
    source = everything.base
    label_maps = params.data.label_map
    if label_maps and shards:
        raise DataError(
            f"{INGESTED}: holds ingested images, which have no label maps; move them away for task segmentation"
        )
    image_classes = ["images"] if label_maps else everything.classes
    skip = params.data.on_bad_image == "skip"
    if not skip:
        check_missing(source)
    inspected = inspect_images(source, "split", hash_function(params.data))
    hashes = {reference: image.sha256 for reference, image in inspected.items() if image.sha256}
    skipped = [row for row in source.rows if inspected[row.reference].problem] if skip else []
    rows = without(source, skipped, image_classes if label_maps else None)
    _check_two_labels(source, rows, hashes)
    groups, alone = image_groups(source, rows, params.data, inspected)
    assigned = assign(rows, image_classes if label_maps else source.classes, params.data, source.origin, groups)
    remarks = group_remarks(assigned, groups, image_classes if label_maps else source.classes, alone)
    problems = [inspected[row.reference].problem for rows in assigned.values() for row in rows]
    check_usable([problem for problem in problems if problem], len(problems))
    held_out = assigned["validation"] + assigned["test"]
    groups |= ingested_groups(everything, held_out, params.data, groups, inspected)
    ingested, already_held = new_images(everything, assigned, hashes, groups)
    excluded = [(row, str(inspected[row.reference].problem)) for row in skipped] + already_held
    assigned["train"] = assigned["train"] + ingested
    hashes |= everything.ingested_hashes
    shared = find_duplicates(assigned, hashes, image_classes)
    duplicates = len({entry[0] for entry in shared})
    if _ingested_shards() != shards:  # DVC hashes the folder only after the stage, and would not run the stage again
        raise StageError(f"{INGESTED} changed while split ran; run `dvc repro` again")
    reasons = [(row.split, row.sample_id, image_classes[row.label], problem) for row, problem in excluded]
    label_map_fields = inspected if label_maps else None
    _write(output, assigned, hashes, everything.classes, shared, reasons, groups, taxonomy, label_map_fields)
    remarks += _remarks(output, duplicates, len(skipped), len(source.rows), len(already_held), bool(groups))
    for remark in remarks:
        print(f"split: {remark}", file=sys.stderr)
    sizes = {split: len(rows) for split, rows in assigned.items()}
    number = len({groups[row.reference] for rows in assigned.values() for row in rows}) if groups else 0
    return Result(sizes, len(everything.classes), duplicates, len(skipped), len(ingested), output, number)


def _remarks(output: Path, duplicates: int, skipped: int, images: int, already_held: int, grouped: bool) -> list[str]:
    """Remarks on images in two splits, unusable ones, and ingested ones that are left out, each with its table."""
    remarks = []
    if duplicates:
        remarks.append(f"{counted(duplicates, 'image', 'are')} in more than one split; see {output}/duplicates.csv")
    if skipped:
        share = f"{skipped:,} of {counted(images, 'image')}"
        remarks.append(f"{share} cannot be used and were left out; see {output}/skipped.csv")
    if already_held:
        where = "in a split of the source already" + (", or of a held-out group" if grouped else "")
        remarks.append(f"{counted(already_held, 'ingested image', 'are')} {where}; see {output}/skipped.csv")
    return remarks


def _check_two_labels(source: Source, rows: list[Row], hashes: dict[str, str]) -> None:
    """Refuse an image with two labels. Of a published data set, print the number of such pairs."""
    if source.origin not in PUBLISHED:
        check_labels(source, {row.reference: hashes[row.reference] for row in rows if row.reference in hashes})
    elif pairs := conflicting_labels(rows, hashes):
        print(
            f"split: {counted(len(pairs), 'image', 'lie')} under two labels; kept, as {source.origin} is published",
            file=sys.stderr,
        )


def _ingested_shards() -> list[str]:
    return sorted(path.name for path in INGESTED.glob("*.parquet"))


def new_images(
    source: SourceWithIngested, assigned: dict[str, list[Row]], hashes: dict[str, str], groups: ImageGroups
) -> tuple[list[Row], list[tuple[Row, str]]]:
    """Ingested images for training, and those in a split of the source or of a held-out group, with the reason.

    `tailor ingest` rejects images of the held-out splits, but another seed or more images in the source change which are
    held out. groups: of all images by reference; {} without groups.
    """
    split_of = {hashes[row.reference]: split for split in reversed(SPLITS) for row in assigned[split]}
    held_out = {groups[row.reference]: split for split in SPLITS[1:] for row in assigned[split] if groups}
    new, excluded = [], []
    for row in source.ingested:
        digest, group = source.ingested_hashes[row.reference], groups.get(row.reference, "")
        if digest in split_of:
            excluded.append((row, f"is in {split_of[digest]} already"))
        elif group in held_out:
            excluded.append((row, f"is of group {group!r}, which is in {held_out[group]}"))
        else:
            new.append(row)
    return new, excluded


def _write(
    output: Path,
    assigned: dict[str, list[Row]],
    hashes: dict[str, str],
    classes: list[str],
    shared: list[tuple[str, str, str, str]],
    reasons: list[tuple[str, str, str, str]],
    groups: ImageGroups,
    taxonomy: Taxonomy | None,
    label_maps: dict[str, InspectionResult] | None,
) -> None:
    """Write the split's folder; with groups, the tables have a column `group`."""
    schema = SCHEMA.append(pa.field(GROUP, pa.string())) if groups else SCHEMA
    with whole_folder(output) as folder:
        for split, rows in assigned.items():
            columns = [[row.sample_id for row in rows], [row.label for row in rows], [row.reference for row in rows]]
            columns += [[hashes[row.reference] for row in rows]]
            columns += [[groups[row.reference] for row in rows]] if groups else []
            table = pa.table(columns, schema=schema)
            for field in LABEL_MAP_FIELDS if label_maps is not None else ():
                values = [getattr(label_maps[row.reference], field.name) for row in rows]
                table = table.append_column(field, pa.array(values, field.type))
            pyarrow.parquet.write_table(table, folder / f"{split}.parquet")
        write_json(folder / "classes.json", classes)
        if taxonomy is not None:
            write_json(folder / TAXONOMY, {"names": taxonomy.names, "parents": taxonomy.parents})
        write_file(folder / "duplicates.csv", as_csv(shared, ["sha256", "split", "sample_id", "class"]))
        write_file(folder / "skipped.csv", as_csv(reasons, ["split", "sample_id", "class", "problem"]))


if __name__ == "__main__":
    sys.exit(stage_main(run, "Split the source into training, validation and test."))

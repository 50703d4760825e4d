"""`data pack`: write many small image files, bytes unchanged, into a few Parquet shards for source `table`."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import yaml

from pipeline.data.assignment import SPLITS
from pipeline.data.inspection import check_missing
from pipeline.params import Params
from pipeline.shared.artifacts import sha256_of, sha256_of_json, unfinished, write_json
from pipeline.shared.errors import ParamsError
from pipeline.shared.progress import progress_bar
from pipeline.sources import BadImageError, Row, Source, in_parts, open_base_source
from pipeline.sources.shards import CLASSES_KEY, ORIGIN_KEY
from serving.shared.terminal import counted

PLAN, SUMMARY = ".pack.json", "pack.json"
STATE_KEY = b"tailor.pack"  # in a shard's metadata: number of source rows done after it, images skipped in it
ROW_GROUP_BYTES = 8 * 1024 * 1024  # largest read for one image at random


@dataclass(frozen=True)
class PackResult:
    """Result of a pack: images and shards of each split, number of images skipped by data.on_bad_image: skip."""

    images: dict[str, int]
    shards: dict[str, int]
    skipped: int
    output: Path

    def __str__(self) -> str:
        parts = ", ".join(
            f"{self.images[split]:,} {split} in {counted(self.shards[split], 'shard')}" for split in self.images
        )
        skipped = f"; {counted(self.skipped, 'image')} skipped, listed in {SUMMARY}" if self.skipped else ""
        return f"{parts}{skipped} → {self.output}"

    def as_mapping(self) -> dict[str, Any]:
        """The result as JSON-serialisable values; `params` has the values of `params_yaml`."""
        return {
            "output": str(self.output), "images": self.images, "shards": self.shards, "skipped": self.skipped,
            "params": yaml.safe_load(self.params_yaml()),
        }  # fmt: skip

    def params_yaml(self) -> str:
        """Lines of params.yaml with which training reads the pack."""
        splits = "".join(f"\n    {split}: {split}" for split in self.images)
        return f"data:\n  source: table\n  location: {self.output}\n  table:{splits}\n    id: name"


def read_image(source: Source, row: Row) -> bytes | BadImageError:
    """The bytes of an image, or the error with which it cannot be read."""
    try:
        return source.read(row.reference)
    except BadImageError as error:
        return error


def pack(
    params: Params,
    output: Path,
    shard_bytes: int,
    jobs: int | None = None,
    shuffle: int | None = None,
    read: Callable[[Source, Row], bytes | BadImageError] = read_image,
) -> PackResult:
    """Write the source's images to output/<split>/00000.parquet and following shards of about shard_bytes each.

    shuffle: seed of a random order, None is the source's order. A stream shuffles a few row groups at a time; with the
    random order these contain all classes. jobs: images read in parallel. read: reads one image.

    Columns: image (the file's bytes), label (int32), name (the sample id); class names are in the shards' metadata. The
    output folder is created atomically. An interrupted run resumes after its last complete shard and gives a
    bit-identical result. Raises ParamsError if `output` exists, DataError for missing or unreadable images unless
    data.on_bad_image is skip.
    """
    if params.data.label_map:
        raise ParamsError(
            "data.label_map is set; a pack holds no label maps: write a table with a column of them instead"
        )
    if output.exists():
        raise ParamsError(f"{output}: exists already; remove it or give another folder")
    source = open_base_source(params.data)
    if params.data.on_bad_image == "fail":
        check_missing(source)
    rows = {split: [row for row in source.rows if row.split == split] for split in SPLITS}
    if shuffle is not None:
        generator = np.random.default_rng(shuffle)
        rows = {split: [part[i] for i in generator.permutation(len(part))] for split, part in rows.items()}
    work = _prepare(unfinished(output), source, params, [shard_bytes, shuffle])
    writers = {}
    with progress_bar(unit="images") as bar, ThreadPoolExecutor(jobs) as pool:
        task = bar.add_task("pack: reading images", total=len(source.rows), rate="")
        for split, split_rows in rows.items():
            if split_rows:
                writers[split] = writer = _ShardWriter(work / split, source, shard_bytes)
                bar.advance(task, writer.next)
                for part in in_parts(split_rows[writer.next :], 64):
                    for row, data in zip(part, pool.map(lambda row: read(source, row), part), strict=True):
                        if isinstance(data, BadImageError) and params.data.on_bad_image == "fail":
                            raise data
                        writer.add(row, data)
                    bar.advance(task, len(part))
                writer.close_shard()
    shards = {split: sorted((work / split).glob("*.parquet")) for split in writers}
    skipped = [problem for writer in writers.values() for problem in writer.skipped]
    images = {split: writer.images for split, writer in writers.items()}
    hashes = {path.relative_to(work).as_posix(): sha256_of(path) for paths in shards.values() for path in paths}
    summary = {"classes": len(source.classes), "images": images, "skipped": skipped, "sha256": hashes}
    write_json(work / SUMMARY, summary)
    (work / PLAN).unlink()
    work.rename(output)
    return PackResult(images, {split: len(paths) for split, paths in shards.items()}, len(skipped), output)


def _prepare(work: Path, source: Source, params: Params, options: list[int | None]) -> Path:
    """The work folder: that of an interrupted run with equal source, shard size and order, else an empty one."""
    rows = [[row.reference, row.label, row.sample_id, row.split] for row in source.rows]
    plan = sha256_of_json([params.data.location, params.data.on_bad_image, source.classes, rows, options])
    if not (work / PLAN).is_file() or json.loads((work / PLAN).read_text(encoding="utf-8")) != plan:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_json(work / PLAN, plan)
    return work


class _ShardWriter:
    """Writes the shards of one split; a complete shard gets its final name, and its metadata has the progress."""

    def __init__(self, folder: Path, source: Source, shard_bytes: int) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._shard_bytes = folder, shard_bytes
        self._schema = pa.schema(
            [("image", pa.binary()), ("label", pa.int32()), ("name", pa.string())],
            metadata={CLASSES_KEY: json.dumps(source.classes), ORIGIN_KEY: json.dumps(source.origin)},
        )
        self._buffer: list[tuple[bytes, int, str]] = []
        self._buffered = self._written = 0
        self._stream: BinaryIO | None = None
        self._shards = self.next = self.images = 0
        self.skipped: list[str] = []
        for path in sorted(folder.glob("*.parquet")):  # complete shards of an interrupted run
            footer = pyarrow.parquet.read_metadata(path)
            state = json.loads(footer.metadata[STATE_KEY])
            self._shards, self.next = self._shards + 1, state["next"]
            self.images += footer.num_rows
            self.skipped += state["skipped"]
        self._skipped_before = len(self.skipped)

    def add(self, row: Row, data: bytes | BadImageError) -> None:
        """Add the next row of the split: its image bytes, or the error for which it is skipped."""
        self.next += 1
        if isinstance(data, BadImageError):
            self.skipped.append(str(data))
            return
        self.images += 1
        self._buffer.append((data, row.label, row.sample_id))
        self._buffered += len(data)
        if self._buffered >= ROW_GROUP_BYTES or self._buffered + self._written >= self._shard_bytes:
            self._write_group()
        if self._written >= self._shard_bytes:
            self.close_shard()

    def _write_group(self) -> None:
        if self._stream is None:
            self._stream = self._partial.open("wb")
            # Image bytes are compressed already.
            compression = {"image": "none", "label": "zstd", "name": "zstd"}
            self._parquet = pyarrow.parquet.ParquetWriter(
                self._stream,
                self._schema,
                compression=compression,
                use_dictionary=["label"],
                write_statistics=["label"],
            )
        columns = [list(column) for column in zip(*self._buffer, strict=True)]
        self._parquet.write_table(pa.table(columns, schema=self._schema))
        self._written += self._buffered
        self._buffer, self._buffered = [], 0

    def close_shard(self) -> None:
        """Complete the shard that is being written, if there is one."""
        if self._buffer:
            self._write_group()
        if self._stream is None:
            return
        state = {"next": self.next, "skipped": self.skipped[self._skipped_before :]}
        self._parquet.add_key_value_metadata({STATE_KEY: json.dumps(state)})
        self._parquet.close()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._partial.replace(self._folder / f"{self._shards:05d}.parquet")
        self._stream, self._written, self._shards = None, 0, self._shards + 1
        self._skipped_before = len(self.skipped)

    @property
    def _partial(self) -> Path:
        return self._folder / f".{self._shards:05d}.partial"

"""What `tailor ingest` took in: training images beside those of any source, in shards that nothing changes."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.prior import class_key
from pipeline.shared.artifacts import INGESTED, sha256_of
from pipeline.shared.errors import DataError
from pipeline.sources.shards import RowGroups, Shard, row_groups
from pipeline.sources.source import Groups, Reader, Row, Source
from pipeline.sources.storage import Storage

PREFIX = "ingested:"  # of the references to these images
# label: the class by name. name: where the image lay in the drop folder. sha256: of the image's bytes.
SCHEMA = pa.schema([("image", pa.binary()), ("label", pa.string()), ("name", pa.string()), ("sha256", pa.string())])
NEW_CLASSES_KEY = b"tailor.new_classes"  # JSON list: classes that first came with this shard


class Ingested:
    """The shards of a folder, each named `<sha256 of the file>.parquet`; only their footers are read until more is needed."""

    def __init__(self, folder: Path = INGESTED) -> None:
        self.folder = folder
        storage = Storage(str(folder))
        self._shards = {path.name: Shard(storage, path.name) for path in sorted(folder.glob("*.parquet"))}
        self._images = RowGroups("image")

    def check(self) -> None:
        """Raise DataError for a shard whose sha256 is not its name; every byte is read."""
        for path in map(self.folder.joinpath, self._shards):
            if sha256_of(path) != path.stem:
                raise DataError(f"{path}: its content is not what its name says; restore it from a copy, or remove it")

    @cached_property
    def new_classes(self) -> list[str]:
        """Classes that came with a shard, sorted, so that a later shard does not renumber them unless it adds one."""
        found = (shard.carried(NEW_CLASSES_KEY) or [] for shard in self._shards.values())
        return sorted({class_key(name) for names in found for name in names})

    def content(self) -> list[tuple[str, str]]:
        """(sha256, class name) of every image."""
        return [
            (digest, class_key(label))
            for shard in self._shards.values()
            for digest, label in zip(*_columns(shard, "sha256", "label"), strict=True)
        ]

    def rows(self, classes: list[str]) -> list[Row]:
        """Every image as a training row, shard by shard in the order of their names. Raises DataError for an unknown class."""
        number = {name: index for index, name in enumerate(classes)}
        rows = []
        for shard in self._shards.values():
            for index, (label, digest) in enumerate(zip(*_columns(shard, "label", "sha256"), strict=True)):
                label = class_key(label)
                if label not in number:
                    raise DataError(
                        f"{shard.place}: holds the class {label!r}, which the source does not have; it was taken in for "
                        "other data: move the file out of the folder, or restore the source"
                    )
                rows.append(Row(f"{PREFIX}{shard.name}#{index}", number[label], f"ingested/{digest}", "train"))
        return rows

    def hashes(self) -> dict[str, str]:
        """sha256 of each image by reference."""
        return {
            f"{PREFIX}{shard.name}#{index}": digest
            for shard in self._shards.values()
            for index, digest in enumerate(_columns(shard, "sha256")[0])
        }

    def read(self, reference: str) -> bytes:
        """Encoded bytes of one image. Raises DataError when its shard is not there."""
        name, index = _place(reference)
        if name not in self._shards:
            raise DataError(f"{self.folder / name}: no such file; restore it, or run `dvc repro split` without it")
        return self._images.value(self._shards[name], index)

    def groups(self, references: pa.ChunkedArray) -> Groups:
        """The row groups of images taken in."""
        return row_groups(pc.utf8_slice_codeunits(references, len(PREFIX)), self._shards, "image")

    def place(self, reference: str) -> str:
        """The shard's path and the row."""
        name, index = _place(reference)
        return f"{self.folder / name}#{index}"


class WithIngested:
    """A source whose `read` also finds the images taken in, and whose classes include the new ones, after its own.

    `own` is the source, and `rows` are its alone: what is held out, and what the profile keeps, is chosen as if nothing
    had been taken in. `ingested` holds the rows beside, which are all for training.
    """

    def __init__(self, source: Source, ingested: Ingested) -> None:
        self.own, self._ingested = source, ingested
        self.origin, self.rows = source.origin, source.rows
        known = set(source.classes)
        self.classes = source.classes + [name for name in ingested.new_classes if name not in known]

    def check(self) -> None:
        """As `Ingested.check`."""
        self._ingested.check()

    @cached_property
    def ingested(self) -> list[Row]:
        """The images taken in."""
        return self._ingested.rows(self.classes)

    @cached_property
    def ingested_hashes(self) -> dict[str, str]:
        """sha256 of each image taken in, by reference."""
        return self._ingested.hashes()

    def read(self, reference: str) -> bytes:
        """As the source does, or from a shard."""
        return self._ingested.read(reference) if reference.startswith(PREFIX) else self.own.read(reference)

    def missing(self) -> list[Row]:
        """Those of the source; a shard is there whole or not at all."""
        return self.own.missing()

    def why_missing(self, rows: list[Row]) -> str | None:
        """As of the source."""
        return self.own.why_missing(rows)

    def stamp(self, reference: str) -> str | None:
        """For a shard its name, which is its sha256; otherwise as of the source."""
        return reference if reference.startswith(PREFIX) else self.own.stamp(reference)

    def place(self, row: Row) -> str:
        """Where a user finds the image."""
        return self._ingested.place(row.reference) if row.reference.startswith(PREFIX) else self.own.place(row)


class ReaderWithIngested:
    """A reader that also finds the images taken in; they are read in groups where the source's own are."""

    def __init__(self, own: Reader, ingested: Ingested) -> None:
        self._own, self._ingested = own, ingested

    def read(self, reference: str) -> bytes:
        """As the reader does, or from a shard."""
        return (self._ingested if reference.startswith(PREFIX) else self._own).read(reference)

    def groups(self, references: pa.ChunkedArray) -> Groups | None:
        """Those of the reader, and behind them those of what was taken in."""
        new = pc.starts_with(references, PREFIX)
        own = self._own.groups(references.filter(pc.invert(new)))
        ingested = new.to_numpy()
        if own is None or not ingested.any():
            return own
        added = self._ingested.groups(references.filter(new))
        number = np.empty(len(ingested), dtype=np.int64)
        number[~ingested], number[ingested] = own.number, len(own.sizes) + added.number
        return Groups(number, np.concatenate([own.sizes, added.sizes]))


def new_classes_metadata(names: list[str]) -> dict[bytes, bytes]:
    """Metadata of a shard that brings these classes."""
    return {NEW_CLASSES_KEY: json.dumps(names, ensure_ascii=False).encode()}


def _columns(shard: Shard, *names: str) -> list[list[str]]:
    return [shard.column(name).to_pylist() for name in names]


def _place(reference: str) -> tuple[str, int]:
    name, _, index = reference.removeprefix(PREFIX).rpartition("#")
    return name, int(index)

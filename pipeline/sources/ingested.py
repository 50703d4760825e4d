"""Ingested images: training images from `tailor ingest`, in immutable shards, in addition to those of the source."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.prior import class_key
from pipeline.shared.artifacts import INGESTED, sha256_of
from pipeline.shared.errors import DataError
from pipeline.sources.shards import RowGroupCache, Shard, row_groups
from pipeline.sources.source import Groups, ImageReader, Row, Source
from pipeline.sources.storage import Storage

PREFIX = "ingested:"  # of the references to these images
# label: class name. name: path of the image in the drop folder. sha256: of the image's bytes.
SCHEMA = pa.schema([("image", pa.binary()), ("label", pa.string()), ("name", pa.string()), ("sha256", pa.string())])
NEW_CLASSES_KEY = b"tailor.new_classes"  # JSON list: classes that first came with this shard
# With data.group a shard has a column `group` too, and data.group of that time as JSON under this key.
GROUP, GROUP_KEY = "group", b"tailor.group"


class Ingested:
    """Shards of ingested images in a folder, named `<sha256 of the file>.parquet`; on opening only footers are read."""

    def __init__(self, folder: Path = INGESTED) -> None:
        self.folder = folder
        storage = Storage(str(folder))
        self._shards = {path.name: Shard(storage, path.name) for path in sorted(folder.glob("*.parquet"))}
        self._images = RowGroupCache("image")

    def check(self) -> None:
        """Raise DataError for a shard whose sha256 differs from its name; reads all bytes."""
        for path in map(self.folder.joinpath, self._shards):
            if sha256_of(path) != path.stem:
                raise DataError(f"{path}: its sha256 differs from its name; restore it from a copy, or remove it")

    @cached_property
    def new_classes(self) -> list[str]:
        """Classes added by shards, sorted, so that their numbers change only if a later shard adds a class."""
        names = (name for shard in self._shards.values() for name in shard.metadata_value(NEW_CLASSES_KEY) or [])
        return sorted(set(map(class_key, names)))

    def content(self) -> list[tuple[str, str]]:
        """(sha256, class name) of each image."""
        return [(digest, class_key(label)) for _, _, (digest, label) in self._values("sha256", "label")]

    def rows(self, classes: list[str]) -> list[Row]:
        """All images as training rows, in the order of the shard names. Raises DataError for an unknown class."""
        number = {name: index for index, name in enumerate(classes)}
        rows = []
        for shard, index, (label, digest) in self._values("label", "sha256"):
            name = class_key(label)
            if name not in number:
                raise DataError(
                    f"{shard.location}: holds the class {name!r}, which the source does not have; it was ingested for "
                    "another data set: move the file out of the folder, or restore the source"
                )
            rows.append(Row(f"{PREFIX}{shard.name}#{index}", number[name], f"ingested/{digest}", "train"))
        return rows

    def hashes(self) -> dict[str, str]:
        """sha256 of each image by reference."""
        return {f"{PREFIX}{shard.name}#{index}": digest for shard, index, (digest,) in self._values("sha256")}

    def names(self) -> dict[str, str]:
        """Path of each image in its drop folder, by reference."""
        return {f"{PREFIX}{shard.name}#{index}": name for shard, index, (name,) in self._values("name")}

    def groups_for(self, setting: str) -> dict[str, str | None]:
        """Group of each image of the shards that were ingested with this data.group, by reference."""
        shards = [shard for shard in self._shards.values() if shard.metadata_value(GROUP_KEY) == setting]
        return {
            f"{PREFIX}{shard.name}#{index}": group
            for shard in shards
            for index, group in enumerate(shard.column(GROUP).to_pylist())
        }

    def _values(self, *columns: str) -> Iterator[tuple[Shard, int, tuple[str, ...]]]:
        for shard in self._shards.values():
            values = (shard.column(column).to_pylist() for column in columns)
            for index, row in enumerate(zip(*values, strict=True)):
                yield shard, index, row

    def read(self, reference: str) -> bytes:
        """Encoded bytes of one image. Raises DataError if its shard does not exist."""
        name, _, index = reference.removeprefix(PREFIX).rpartition("#")
        if name not in self._shards:
            raise DataError(f"{self.folder / name}: no such file; restore it, or run `dvc repro split` without it")
        return self._images.value(self._shards[name], int(index))

    def groups(self, references: pa.ChunkedArray) -> Groups:
        """Row groups of ingested images."""
        return row_groups(pc.utf8_slice_codeunits(references, len(PREFIX)), self._shards, "image")


class ReaderWithIngested(ImageReader):
    """A reader combined with the ingested images, which have groups if the images of the source have groups."""

    def __init__(self, base: ImageReader, ingested: Ingested) -> None:
        self.base, self.shards = base, ingested

    def read(self, reference: str) -> bytes:
        """Encoded bytes of an image, from the reader or an ingested shard."""
        return (self.shards if reference.startswith(PREFIX) else self.base).read(reference)

    def groups(self, references: pa.ChunkedArray) -> Groups | None:
        """Groups of the reader, followed by those of the ingested images."""
        mask = pc.starts_with(references, PREFIX)
        base = self.base.groups(references.filter(pc.invert(mask)))
        is_ingested = mask.to_numpy()
        if base is None or not is_ingested.any():
            return base
        added = self.shards.groups(references.filter(mask))
        number = np.empty(len(is_ingested), dtype=np.int64)
        number[~is_ingested], number[is_ingested] = base.number, len(base.sizes) + added.number
        return Groups(number, np.concatenate([base.sizes, added.sizes]))


class SourceWithIngested(ReaderWithIngested, Source):
    """A source combined with the ingested images; their new classes follow the classes of the source.

    base: the source. rows: of the source only, so that held-out images and the long-tail profile do not depend on
    ingested images. ingested: the rows of the ingested images, all for training. `read` reads both.
    """

    base: Source

    def __init__(self, source: Source, ingested: Ingested) -> None:
        super().__init__(source, ingested)
        self.origin, self.rows = source.origin, source.rows
        self.classes = list(dict.fromkeys(source.classes + ingested.new_classes))

    @cached_property
    def ingested(self) -> list[Row]:
        """Rows of the ingested images."""
        return self.shards.rows(self.classes)

    @cached_property
    def ingested_hashes(self) -> dict[str, str]:
        """sha256 of each ingested image, by reference."""
        return self.shards.hashes()

    def missing(self) -> list[Row]:
        """Missing rows of the source; images of a shard are never missing one by one."""
        return self.base.missing()

    def why_missing(self, rows: list[Row]) -> str | None:
        """As `Source.why_missing` of the source."""
        return self.base.why_missing(rows)

    def column(self, name: str) -> dict[str, str]:
        """As `Source.column` of the source."""
        return self.base.column(name)

    def stamp(self, reference: str) -> str | None:
        """For an ingested image the reference, which has the shard's sha256; otherwise as the source."""
        return reference if reference.startswith(PREFIX) else self.base.stamp(reference)

    def location(self, row: Row) -> str:
        """Location of the image, for messages."""
        name = row.reference.removeprefix(PREFIX)
        return self.base.location(row) if name == row.reference else str(self.shards.folder / name)


def new_classes_metadata(names: list[str]) -> dict[bytes, bytes]:
    """Parquet metadata of a shard that adds these classes."""
    return {NEW_CLASSES_KEY: json.dumps(names, ensure_ascii=False).encode()}

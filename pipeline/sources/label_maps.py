"""Sources of task segmentation: images with a label map each, as a table or as folders `images` and `annotations`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from models.image_names import FOLDER_LINK, NOT_UTF8, has_image_suffix, is_passed_over, is_utf8
from models.preprocess import PNG, ImageError, opened
from models.prior import class_key
from pipeline.params import LabelMapParams, TableParams
from pipeline.shared.errors import DataError, raise_problems
from pipeline.sources.shards import CACHE_BYTES, ORIGIN_KEY, RowGroupCache, image_bytes
from pipeline.sources.source import BadImageError, FileSource, Row, Source, read_image_file
from pipeline.sources.table import TableReader, TableSource

IMAGES, ANNOTATIONS = "images", "annotations"
UNLABELLED = 255  # value of a pixel without a class in a decoded label map
SPLITS = {
    "train": "train", "training": "train", "val": "validation", "validation": "validation", "test": "test",
}  # fmt: skip
# The labels of ADE20K's test images are not public; its validation images are the test split, as in the literature.
ADE20K_SPLITS = {"training": "train", "validation": "test"}
GREY, PALETTE = 0, 3  # colour types of a PNG
NO_IMAGE = f"has no image in {IMAGES}/; remove it or restore the image"
OTHER_FORM = (
    f"has the name of an image in {IMAGES}/ in another Unicode form (NFC, NFD); rename one, for instance with convmv"
)


class LabelMapSource(Source):
    """A source whose images have label maps. Row.label is 0: a class belongs to a pixel, not to an image."""

    label_maps: LabelMapParams

    def read_label_map(self, reference: str) -> bytes:
        """Encoded label map of an image. Raises BadImageError if it does not exist."""
        raise NotImplementedError


class LabelMapTable(TableSource, LabelMapSource):
    """A table with a column of label maps: encoded, or paths if the images are paths. Raises DataError with file and column.

    With table.split, a column of the files of `train` has the split of each row; otherwise each split has its files.
    """

    def __init__(
        self, location: str, table: TableParams, label_maps: LabelMapParams, cache_bytes: int = CACHE_BYTES
    ) -> None:
        # The base reads the label column only on request, so that it can be the column of label maps.
        TableReader.__init__(self, location, table.model_copy(update={"label": label_maps.column}), cache_bytes)
        self.label_maps, self.classes = label_maps, [class_key(name) for name in label_maps.class_names]
        self.origin = self._splits["train"][0].metadata_value(ORIGIN_KEY) or "table"
        self._stamps: dict[str, str | None] = {}
        self._maps = RowGroupCache(label_maps.column, cache_bytes)
        self.rows = [row for split in self._splits for row in self._labelled_rows(split)]
        if not any(row.split == "train" for row in self.rows):
            raise DataError(f"{self._split_location('train')}: has no training rows")

    def read_label_map(self, reference: str) -> bytes:
        """Bytes of the label map's column, or of the file that it names."""
        name, _, index = reference.rpartition("#")
        value = image_bytes(self._maps.value(self._shards[name], int(index)))
        if value is None:
            raise BadImageError(
                f"{self._shards[name].location}: row {index} has no label map; remove the row or give it one"
            )
        return value if isinstance(value, bytes) else self._storage.read(value)

    def _labelled_rows(self, split: str) -> Iterator[Row]:
        column = self._params.id or self._params.path
        for shard in self._splits[split]:
            ids = shard.column(column).to_pylist() if column else None
            splits = shard.column(self._params.split) if self._params.split and split == "train" else None
            names = self._split_names(shard.location, splits) if splits is not None else [split] * len(shard)
            for index, own in enumerate(names):
                reference = f"{shard.name}#{index}"
                yield Row(reference, 0, str(ids[index]) if ids else reference, own)

    def _split_names(self, location: str, column: pa.ChunkedArray) -> list[str]:
        values = column.to_pylist()
        wrong = next((value for value in values if value not in SPLITS), None) if set(values) - set(SPLITS) else None
        if set(values) - set(SPLITS):
            raise DataError(
                f"{location}: column {self._params.split!r} has the value {wrong!r}; expected {', '.join(SPLITS)}"
            )
        return [SPLITS[value] for value in values]


class LabelMapFolder(FileSource, LabelMapSource):
    """Folders `images` and `annotations`: for images/a/b.jpg the label map annotations/a/b.png.

    splits: meaning of the folders inside `images`. If none of them is the training split, all images are training
    images. Raises DataError, in one error for all of them, for images with the same label map, names that are not UTF-8,
    links to folders and label maps without an image.
    """

    def __init__(self, root: Path, origin: str, label_maps: LabelMapParams) -> None:
        super().__init__(root)
        self.origin, self.label_maps = origin, label_maps
        self.classes = [class_key(name) for name in label_maps.class_names]
        for name in (IMAGES, ANNOTATIONS):
            if not (root / name).is_dir():
                raise DataError(f"{root}: has no folder {name}; expected {IMAGES}/ and {ANNOTATIONS}/")
        splits = ADE20K_SPLITS if origin == "ade20k" else SPLITS
        images = [path for path in _files_below(root / IMAGES) if has_image_suffix(path)]
        folders = {path.parts[0] for path in images if len(path.parts) > 1}
        divided = any(splits.get(name) == "train" for name in folders)
        pngs = (path for path in _files_below(root / ANNOTATIONS) if path.suffix.lower() == ".png")
        self._maps = {path.with_suffix(""): path for path in pngs}
        without_suffix = [path.with_suffix("") for path in images]
        problems = [(root / IMAGES / path, NOT_UTF8) for path in images if not is_utf8(str(path))]
        both = [path for name in (IMAGES, ANNOTATIONS) for path in sorted((root / name).rglob("*"))]
        problems += [
            (path, FOLDER_LINK)
            for path in both
            if path.is_symlink() and path.is_dir() and not is_passed_over(path.relative_to(root))
        ]
        forms = {class_key(str(path)) for path in without_suffix}
        problems += [
            (root / ANNOTATIONS / self._maps[path], OTHER_FORM if class_key(str(path)) in forms else NO_IMAGE)
            for path in sorted(self._maps.keys() - set(without_suffix))
        ]
        problems += [
            (root / IMAGES / path, "another image has its name with another suffix, and so the same label map")
            for path, name, before in zip(images[1:], without_suffix[1:], without_suffix, strict=False)
            if name == before
        ]
        self.rows = []
        for path in images:
            split = splits.get(path.parts[0]) if divided and len(path.parts) > 1 else None if divided else "train"
            if split is None:
                allowed = ", ".join(splits)
                problems.append(
                    (root / IMAGES / path, f"is in no folder of a split; expected a folder among {allowed}")
                )
            else:
                self.rows.append(Row(f"{IMAGES}/{path.as_posix()}", 0, path.as_posix(), split))
        raise_problems(root, problems)
        if not self.rows:
            raise DataError(f"{root / IMAGES}: holds no images")

    def read_label_map(self, reference: str) -> bytes:
        """Bytes of the label map's file."""
        path = self._label_map(reference)
        if not path.exists():
            raise BadImageError(f"{self._root / reference}: has no label map; expected {path}")
        return read_image_file(path)

    def stamp(self, reference: str) -> str | None:
        """Sizes and mtimes of the image and of its label map; None if the image does not exist."""
        stamps = [super(LabelMapFolder, self).stamp(name) for name in (reference, str(self._label_map(reference)))]
        return stamps[0] and " ".join(stamp or "-" for stamp in stamps)

    def _label_map(self, reference: str) -> Path:
        relative = Path(reference).relative_to(IMAGES)
        found = self._maps.get(relative.with_suffix(""), relative.with_suffix(".png"))
        return (self._root / ANNOTATIONS / found).absolute()


def _files_below(root: Path) -> list[Path]:
    """Files below a folder, sorted, as paths relative to it, without hidden files and those of tools."""
    relative = (path.relative_to(root) for path in root.rglob("*") if not path.is_dir())
    return sorted(path for path in relative if not is_passed_over(path))


def decode_label_map(data: bytes, size: tuple[int, int], params: LabelMapParams) -> np.ndarray:
    """Decode a label map to uint8 [H,W]: a class 0..C-1 per pixel, or UNLABELLED. size: width and height of its image.

    Grey pixels and the indexes of a palette, whose colours are not used, are the labels. The size in the header is
    checked before any pixel is decoded. Raises ImageError, also for a label that is no class and a map without any.
    """
    if data[:8] != PNG or len(data) < 26:
        raise ImageError("format", "is no PNG file")
    depth, colour = data[24], data[25]
    if depth > 8:
        raise ImageError("format", f"has {depth} bits per pixel; expected 8, as there are at most 255 classes")
    if colour not in (GREY, PALETTE) or (colour == GREY and depth != 8):
        kind = f"{depth}-bit grey" if colour == GREY else "colours"
        raise ImageError("format", f"has {kind}; expected class numbers as 8-bit grey or as a palette's indexes")
    with opened(data) as image:
        if image.size != size:
            raise ImageError(
                "shape",
                f"has {image.width}x{image.height} pixels, but its image has {size[0]}x{size[1]}; expected equal sizes",
            )
        labels = np.array(image, dtype=np.uint8)
    classes, first = len(params.class_names), int(params.reduce_zero_label)
    table = np.full(256, UNLABELLED, dtype=np.uint8)
    table[first : first + classes] = np.arange(classes)
    allowed = np.zeros(256, dtype=bool)
    allowed[[*range(first + classes), params.ignored]] = True
    present = np.bincount(labels.ravel(), minlength=256) > 0
    if wrong := np.flatnonzero(present & ~allowed).tolist():
        raise ImageError(
            "damaged",
            f"has label {wrong[0]}; expected {first} to {first + classes - 1}, or {params.ignored} for no class",
        )
    if not present[first : first + classes].any():
        raise ImageError("damaged", "has no pixel with a class")
    return table[labels]

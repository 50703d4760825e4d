"""Sources `imagenet_lt`, `places_lt` and `inaturalist2018`: an image root and the official split lists."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from pipeline.params import ListParams
from pipeline.shared.errors import DataError, ParamsError
from pipeline.sources.source import FileSource, Row
from serving.shared.terminal import counted


@dataclass(frozen=True)
class OfficialLists:
    """Official lists of a data set: file names by split (the first existing one is read), folder, number of classes."""

    files: dict[str, tuple[str, ...]]
    folder: str
    classes: int


def _lists_of_liu(name: str) -> dict[str, tuple[str, ...]]:
    return {
        split: (f"{name}_{part}.txt",) for split, part in (("train", "train"), ("validation", "val"), ("test", "test"))
    }


# The validation list of iNaturalist is the test split, as in the literature; the official test labels are not public.
INATURALIST = {
    "train": ("iNaturalist18_train.txt", "train2018.json"),
    "test": ("iNaturalist18_val.txt", "val2018.json"),
}
OFFICIAL = {
    "imagenet_lt": OfficialLists(_lists_of_liu("ImageNet_LT"), "ImageNet_LT", 1000),
    "places_lt": OfficialLists(_lists_of_liu("Places_LT"), "Places_LT_v2", 365),
    "inaturalist2018": OfficialLists(INATURALIST, "iNaturalist18", 8142),
}
Entry = tuple[str, int]
MAX_LIST_BYTES = 512 * 1024 * 1024  # iNaturalist's train2018.json, the largest official one, has 125 million
MAX_LINE = 8192  # characters


class ListSource(FileSource):
    """Images under data.location, listed in files of `relative/path label` lines or in iNaturalist's JSON files.

    Lists are those of data.lists, else the official ones in data.location or its folder of lists. Labels are 0..C-1,
    with C at most the data set's number of classes; a class is named after its folder. Raises ParamsError if there is
    no training list, DataError with the file and line of an invalid entry.
    """

    def __init__(self, name: str, root: Path, lists: ListParams) -> None:
        super().__init__(root)
        self._official, self.origin = OFFICIAL[name], name
        self.lists = _find_lists(name, root, lists)
        if "train" not in self.lists:
            names = " or ".join(self._official.files["train"])
            raise ParamsError(
                f"data.location is {str(root)!r}, which does not hold {names}; put the official lists there or set "
                "data.lists.train"
            )
        entries = {split: list(_entries(path, self._official.classes)) for split, path in self.lists.items()}
        self.classes = self._class_names(entries)
        self.rows = [Row(path, label, path, split) for split, listed in entries.items() for path, label in listed]

    def _class_names(self, entries: dict[str, list[Entry]]) -> list[str]:
        train_list = self.lists["train"]
        folders: dict[int, str] = {}
        for path, label in entries["train"]:
            folders.setdefault(label, path.rpartition("/")[0] or ".")
        classes = max(folders, default=-1) + 1
        if classes < 2:
            raise DataError(f"{train_list}: lists {counted(classes, 'class')}; expected at least 2")
        if len(folders) < classes:
            missing = next(label for label in range(classes) if label not in folders)
            raise DataError(f"{train_list}: label {missing} has no training image; labels must be 0..C-1 without a gap")
        for split, listed in entries.items():
            if unknown := next((entry for entry in listed if entry[1] >= classes), None):
                image, label = unknown
                raise DataError(f"{self.lists[split]}: {image} has label {label}, a class without training images")
        if len(set(folders.values())) < classes:
            return [str(label) for label in range(classes)]
        common = os.path.commonpath(list(folders.values()))
        return [str(PurePosixPath(folders[label]).relative_to(common)) for label in range(classes)]

    def why_missing(self, rows: list[Row]) -> str | None:
        """Probable cause if these images are missing, such as a wrong root or another year; None if unknown."""
        first = rows[0].reference
        if len(rows) == len(self.rows):
            return self._wrong_root(first)
        folders = {row.reference.rpartition("/")[0] for row in rows}
        present = {row.reference.rpartition("/")[0] for row in self.rows} - folders
        name = PurePosixPath(first).name
        flat = PurePosixPath(first).parts[0]
        if (self._root / flat / name).is_file():
            return f"{self._root / flat}/ holds its images flat; sort them into a folder per class"
        if name.startswith("ILSVRC2012") and (self._root / flat / name.replace("2012", "2010")).is_file():
            return "the images there are of ILSVRC 2010; the lists are of ILSVRC 2012"
        missing = [folder for folder in folders if not (self._root / folder).is_dir()]
        if missing and present:
            hint = " (another year's ImageNet? the lists are of ILSVRC 2012)" if self._official.classes == 1000 else ""
            return f"{counted(len(missing), 'whole folder', 'are')} missing, for example {min(missing)}{hint}"
        return None

    def _wrong_root(self, first: str) -> str:
        parts = PurePosixPath(first).parts
        root = self._root.resolve()
        for start in range(1, len(parts)):
            if (root / Path(*parts[start:])).is_file():
                lead = "/".join(parts[:start])
                if root.parts[-start:] == parts[:start]:
                    return f"the lists' paths begin with {lead}/; set data.location to {root.parents[start - 1]}"
                return f"the lists' paths begin with {lead}/, which does not exist; link the folders of {root} into it"
        deeper = next((entry for entry in sorted(root.iterdir()) if (entry / first).is_file()), None)
        if deeper:
            return f"the images are under {deeper}; set data.location to it and data.lists to the lists"
        return f"data.location must be the folder that holds {parts[0]}/"


def _find_lists(name: str, root: Path, lists: ListParams) -> dict[str, Path]:
    official, paths = OFFICIAL[name], {}
    for split, param in (("train", lists.train), ("validation", lists.validation), ("test", lists.test)):
        folders = (Path(), root) if param is not None else (root, root / official.folder)
        files = (param,) if param is not None else official.files.get(split, ())
        candidates = (folder / file for file in files for folder in folders)
        path = next((path for path in candidates if path.is_file() and (param or path not in paths.values())), None)
        if path is not None:
            paths[split] = path
        elif param is not None:
            raise ParamsError(f"data.lists.{split} is {param!r}, which is not a file here or in {root}")
    return paths


def _entries(path: Path, classes: int) -> Iterator[Entry]:
    if (size := path.stat().st_size) > MAX_LIST_BYTES:
        raise DataError(f"{path}: has {size} bytes, above the limit of {MAX_LIST_BYTES} of a list")
    read = _read_json if path.suffix == ".json" else _read_lines
    for where, image, label in read(path):
        if not 0 <= label < classes:
            raise DataError(f"{path}: {where}: label {label}; expected 0 to {classes - 1}")
        if image.startswith("/") or ".." in image.split("/"):
            raise DataError(f"{path}: {where}: {image!r} leaves the image root; expected a path relative to it")
        yield image, label


def _read_lines(path: Path) -> Iterator[tuple[str, str, int]]:
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(iter(partial(stream.readline, MAX_LINE), ""), 1):
                if not line.strip():
                    continue
                image, _, label = line.strip().rpartition(" ")
                if not image or not label.lstrip("-").isdecimal():
                    raise DataError(f"{path}: line {number} is {line.strip()[:80]!r}; expected `relative/path label`")
                yield f"line {number}", image.strip(), int(label)
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not text; expected lines of `relative/path label`") from None


def _read_json(path: Path) -> Iterator[tuple[str, str, int]]:
    """Read iNaturalist's JSON: images with id and file_name, annotations with image_id and category_id."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        for number, annotation in enumerate(content["annotations"]):
            yield f"annotation {number}", names[annotation["image_id"]], int(annotation["category_id"])
    except (ValueError, KeyError, TypeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else str(error)
        expected = "expected images and annotations"
        raise DataError(f"{path}: not readable as iNaturalist's JSON ({reason}); {expected}") from None

"""Source `folder`: a folder per class."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from models.image_names import has_image_suffix, is_passed_over, is_utf8
from models.prior import class_key
from pipeline.errors import DataError
from pipeline.sources.source import FilesUnderRoot, Row

SPLIT_FOLDERS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


class FolderSource(FilesUnderRoot):
    """A folder per class, named for the class; or train/, validation/ (or val/) and test/, each with a folder per class.

    Classes are numbered in the sorted order of their names in train. Raises DataError for a class folder without
    images, for a class that only a held-out split has, and for a file that is not an image by its suffix.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.origin = "folder"
        folders = {entry.name: entry for entry in _folders(root)}
        if {"val", "validation"} <= set(folders):
            raise DataError(f"{root}: has both val/ and validation/; keep one of them")
        parts = {SPLIT_FOLDERS[name]: path for name, path in folders.items() if name in SPLIT_FOLDERS}
        if "train" not in parts:
            parts = {"train": root}
        self.classes = _class_names(parts["train"])
        if len(self.classes) < 2:
            raise DataError(
                f"{parts['train']}: holds {len(self.classes)} class folders; expected at least 2, one per class"
            )
        self.rows = [row for split, folder in parts.items() for row in self._rows(split, folder)]

    def _rows(self, split: str, folder: Path) -> Iterator[Row]:
        number = {name: index for index, name in enumerate(self.classes)}
        for path in sorted(folder.iterdir()):
            if has_image_suffix(path) and not is_passed_over(path.relative_to(folder)):
                raise DataError(
                    f"{path}: lies beside the class folders; move it into the folder of its class or remove it"
                )
        for class_folder in _folders(folder):
            name = class_key(class_folder.name)
            if name not in number:
                raise DataError(
                    f"{class_folder}: is a class of {split} that train does not have; add training images or remove it"
                )
            files = sorted(
                path
                for path in class_folder.rglob("*")
                if (path.is_symlink() or path.is_file()) and not is_passed_over(path.relative_to(class_folder))
            )
            for path in files:
                _check_name(path, path.relative_to(self._root))
                if path.is_dir():
                    raise DataError(f"{path}: is a link to a folder; put the images there, or link them one by one")
                if not has_image_suffix(path):
                    raise DataError(f"{path}: is not a .jpg, .jpeg, .png or .webp file; remove it or convert it")
                reference = path.relative_to(self._root).as_posix()
                yield Row(reference, number[name], reference, split)
            if not files and split == "train":
                raise DataError(f"{class_folder}: class without training images; add some or remove the folder")

    def why_missing(self, rows: list[Row]) -> str | None:  # noqa: ARG002
        """Always the same: every other file was there a moment ago."""
        return "they are links whose targets are gone"


def _check_name(path: Path, name: Path) -> None:
    if not is_utf8(str(name)):
        raise DataError(f"{path}: its name is not UTF-8; rename it, for instance with convmv")


def _class_names(folder: Path) -> list[str]:
    """Class names of the folders in one, sorted. Raises DataError for two spellings of one name."""
    folders = _folders(folder)
    for entry in folders:
        _check_name(entry, Path(entry.name))
    names = [class_key(entry.name) for entry in folders]
    if len(set(names)) < len(names):
        name = next(name for name in names if names.count(name) > 1)
        raise DataError(
            f"{folder}: has {names.count(name)} folders named {name!r} that differ in their Unicode form (NFC, NFD) alone; "
            "move their images into one"
        )
    return sorted(names)


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not is_passed_over(Path(entry.name)))

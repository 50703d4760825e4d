"""Source `folder`: one folder of images per class, with or without train, validation and test folders."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from models.image_names import FOLDER_LINK, NOT_UTF8, has_image_suffix, is_passed_over, is_utf8
from models.prior import class_key
from pipeline.shared.errors import DataError, raise_problems
from pipeline.sources.source import FileSource, Row
from serving.shared.terminal import counted

SPLIT_FOLDERS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
# Common names of split folders, in lower case → the folder name that is read.
SPLIT_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test", "eval": "test",
}  # fmt: skip
SHOWN = 5  # names in a message
ClassFiles = dict[Path, list[Path]]


class FolderSource(FileSource):
    """A folder per class, named after it; or train/, validation/ (or val/) and test/, each with a folder per class.

    Classes are numbered in the sorted order of their names in train. Raises DataError for folders that cannot be
    classes. Also, in one error for all of them: class folders without images, classes that only a held-out split has,
    and files without an image suffix. remarks: lines on what is read differently from what a user may expect.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.origin = "folder"
        self._problems: list[tuple[Path, str]] = []
        self._passed_over: Counter[str] = Counter()
        folders, files = self._entries(root)
        parts = _split_folders(root, folders)
        self.remarks = _not_read(folders, parts)
        listed = {}
        for split, folder in parts.items():
            inside, beside = (folders, files) if folder == root else self._entries(folder)
            beside = [path for path in beside if has_image_suffix(path)]
            text = "lies beside the class folders; move it into the folder of its class or remove it"
            self._problems += [(path, text) for path in beside]
            listed[split] = {path: sorted(self._files_below(path)) for path in inside}
        self.remarks += _check_levels(parts["train"], listed["train"], root)
        self.classes = _class_names(parts["train"], list(listed["train"]))
        self._problems += [(path, NOT_UTF8) for path in listed["train"] if not is_utf8(path.name)]
        self.rows = [row for split in parts for row in self._rows(split, listed[split])]
        raise_problems(root, self._problems)
        if self._passed_over:
            named = _names([f"{name} ({count:,})" for name, count in self._passed_over.most_common()])
            number = self._passed_over.total()
            self.remarks.append(f"{number:,} hidden files and files or folders of tools were passed over: {named}")

    def _entries(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """List the folders and files of a folder, sorted. Hidden entries and those of tools are skipped and counted."""
        with os.scandir(folder) as iterator:
            entries = sorted(iterator, key=lambda entry: entry.name)
        visible = [entry for entry in entries if not is_passed_over(Path(entry.name))]
        self._passed_over.update(entry.name for entry in entries if is_passed_over(Path(entry.name)))
        folders = [entry for entry in visible if entry.is_dir()]
        files = [entry for entry in visible if not entry.is_dir() and (entry.is_symlink() or entry.is_file())]
        return [folder / entry.name for entry in folders], [folder / entry.name for entry in files]

    def _files_below(self, folder: Path) -> Iterator[Path]:
        folders, files = self._entries(folder)
        yield from files
        for path in folders:
            if path.is_symlink():
                self._problems.append((path, FOLDER_LINK))
            else:
                yield from self._files_below(path)

    def _rows(self, split: str, listed: ClassFiles) -> Iterator[Row]:
        number = {name: index for index, name in enumerate(self.classes)}
        for class_folder, files in listed.items():
            name = class_key(class_folder.name)
            if name not in number:
                text = f"is a class of {split} that train does not have; add training images or remove it"
                self._problems.append((class_folder, text))
                continue
            images = 0
            for path in files:
                if not is_utf8(str(path.relative_to(class_folder))):
                    self._problems.append((path, NOT_UTF8))
                elif not has_image_suffix(path):
                    text = "is not a .jpg, .jpeg, .png or .webp file; remove it or convert it"
                    self._problems.append((path, text))
                else:
                    reference = path.relative_to(self._root).as_posix()
                    yield Row(reference, number[name], reference, split)
                images += has_image_suffix(path)
            if not images and split == "train":
                text = "class without training images; add some or remove the folder"
                self._problems.append((class_folder, text))

    def why_missing(self, rows: list[Row]) -> str | None:  # noqa: ARG002 - same signature as Source
        """Constant: regular files were listed just before, so a missing one is a broken link."""
        return "they are links to files that do not exist"


def _split_folders(root: Path, folders: list[Path]) -> dict[str, Path]:
    """Folder of each split; only the root, as train, if it has no train/. Raises DataError for other split names."""
    names = {path.name for path in folders}
    if {"val", "validation"} <= names:
        raise DataError(f"{root}: has both val/ and validation/; keep one of them")
    if "train" not in names:
        return {"train": root}
    for path in folders:
        meant = SPLIT_NAMES.get(path.name.lower())
        if meant and path.name not in SPLIT_FOLDERS:
            raise DataError(f"{path}: is not read beside train/; rename it to {meant}, or move it out of {root}")
    return {SPLIT_FOLDERS[path.name]: path for path in folders if path.name in SPLIT_FOLDERS}


def _not_read(folders: list[Path], parts: Mapping[str, Path]) -> list[str]:
    """A line on the folders beside train/ that are not splits and are not read; empty if there are none."""
    others = [path for path in folders if path not in parts.values()]
    if not others or folders[0].parent in parts.values():
        return []
    named = _names([str(path) for path in others])
    return [f"{named}: not read; beside train/ only val/ (or validation/) and test/ are"]


def _check_levels(folder: Path, listed: ClassFiles, root: Path) -> list[str]:
    """Detect class folders that hold folders of images but no images: misnamed splits, or classes one level lower.

    Returns a line on those that are read as one class each. Raises DataError if they cannot be classes.
    """
    inner = {}
    for path, files in listed.items():
        below = [file.relative_to(path).parts for file in files if has_image_suffix(file)]
        if below and all(len(parts) > 1 for parts in below):
            inner[path] = sorted({parts[0] for parts in below})
    splits = [path for path in inner if path.name.lower() in SPLIT_NAMES]
    if splits and folder == root and len(listed) > 1:
        others = [path.name for path in inner if path not in splits]
        meant = {path.name: SPLIT_NAMES[path.name.lower()] for path in splits}
        steps = [f"rename {name} to {right}" for name, right in meant.items() if name != right]
        if "train" not in meant.values():
            steps.append(f"name the folder of the training images train{f' ({_names(others)}?)' if others else ''}")
        raise DataError(
            f"{root}: {_names([path.name for path in splits])} would be read as classes, but hold folders of images "
            f"({_names(inner[splits[0]])}) and no train/ is beside; for splits of your own, {', '.join(steps)}; otherwise "
            f"move the class folders up into {root}"
        )
    if len(listed) < 2:
        hint = ""
        for path, names in inner.items():
            # A folder that contains only one folder is not the folder of classes either.
            while len(names) == 1 and len(deeper := _inner_names(path / names[0])) > 0:
                path, names = path / names[0], deeper
            either = f"give {path} as the folder of images, or " if folder == root else ""
            hint = f"; if the folders in {path} ({_names(names)}) are the classes, {either}move them up into {folder}"
        raise DataError(
            f"{folder}: holds {counted(len(listed), 'class folder')}; expected at least 2, one per class{hint}"
        )
    nested = {path.name: names for path, names in inner.items() if len(names) > 1}
    if not nested:
        return []
    named = _names([f"{name} ({_names(names)})" for name, names in nested.items()])
    return [
        f"{folder}: {len(nested):,} of {counted(len(listed), 'class', 'hold')} folders of images and no images of their "
        f"own, and each is read as one class: {named}; if the inner folders are the classes, move them up into {folder}"
    ]


def _inner_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_passed_over(Path(path.name)))


def _names(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _class_names(folder: Path, folders: list[Path]) -> list[str]:
    """Sorted class names of class folders. Raises DataError for two Unicode forms of one name."""
    names = [class_key(entry.name) for entry in folders]
    if len(set(names)) < len(names):
        name = next(name for name in names if names.count(name) > 1)
        raise DataError(
            f"{folder}: has {names.count(name)} folders named {name!r} that differ in their Unicode form (NFC, NFD) alone; "
            "move their images into one"
        )
    return sorted(names)

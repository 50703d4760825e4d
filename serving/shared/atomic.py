"""Atomic writes of files and folders, used for all outputs: a reader sees the old or the complete new content."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Write a folder atomically: it appears at `path` complete or not at all.

    Yields an empty temporary folder beside `path`, which then replaces the old one, synced to disk. On any exception the
    old one stays. Leftovers of a killed run are removed first. Where `path` is a link to a folder, that folder is replaced.
    """
    if path.is_symlink() and path.is_dir():
        path = path.resolve()  # it may be on another disk, and a rename would replace the link
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, retired = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    if retired.exists() and not path.exists():
        retired.rename(path)  # a run was killed between the two renames below: restore the old folder
    for leftover in (partial, retired):
        _remove(leftover)
    partial.mkdir()
    try:
        yield partial
        for file in sorted(partial.rglob("*")):
            sync(file)
        if path.exists() or path.is_symlink():
            path.rename(retired)
        partial.rename(path)
    except BaseException:
        _remove(partial)
        if retired.exists() and not path.exists():
            retired.rename(path)
        raise
    sync(path.parent)
    _remove(retired)


def _remove(path: Path) -> None:
    """Remove a folder, file or link; nothing if it does not exist."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file atomically: write a temporary file beside `path`, sync it, rename it. An OSError names `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    data = content.encode() if isinstance(content, str) else content
    try:
        with partial.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None  # the OSError of a write (full disk) has no file name
        raise
    sync(path.parent)


def move_file(source: Path, path: Path) -> None:
    """Move a complete, synced file to `path` on the same file system, and sync the rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    source.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Sync a file, or a folder's list of names, to disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content as a hexadecimal string."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

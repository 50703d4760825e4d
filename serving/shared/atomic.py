"""Files and folders that appear whole or not at all: how everything that Tailor keeps is written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder that appears at `path` complete or not at all.

    Yields an empty sibling folder to write into. On success every file in it is synced to disk and the folder takes the
    place of the old one; on any exception it is removed and the old one stays. What a killed run left is cleared first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, retired = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    if retired.exists() and not path.exists():
        retired.rename(path)  # killed between the two renames below: the old output is still whole
    for leftover in (partial, retired):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in sorted(partial.rglob("*")):
            sync(file)
        if path.exists():
            path.rename(retired)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if retired.exists() and not path.exists():
            retired.rename(path)
        raise
    sync(path.parent)
    shutil.rmtree(retired, ignore_errors=True)


def write_file(path: Path, content: bytes | str) -> None:
    """Write beside `path`, sync, rename over it: a reader sees the old content or the new. An OSError names `path`."""
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
            error.filename, error.filename2 = str(path), None  # a failed write (full disk) names no file by itself
        raise
    sync(path.parent)


def place_file(written: Path, path: Path) -> None:
    """Put a file that is whole and synced in its place, in a folder of the same file system; the rename is synced too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk before anything that follows."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """sha256 of a file's content as hexadecimal text."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""Quarantine of bad rows: a CSV listing with the reasons, and the bytes of each row."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from pipeline.ingestion.drop_folder import DropRow
from pipeline.ingestion.row_checks import CheckedRow
from pipeline.shared.artifacts import QUARANTINE, as_csv, sha256_of, sha256_of_json, write_file
from pipeline.shared.errors import DataError

LISTING = "rows.csv"


def write_quarantine(folder: Path, bad: list[CheckedRow]) -> tuple[str, list[CheckedRow]]:
    """Write bad rows to `folder`: a listing and the bytes of each.

    Returns a name derived from the content, and the rows whose bytes could not be read; the files of those rows are
    never deleted from the drop folder, only moved.
    """
    folder.mkdir()
    listing = [_listing_row(number, checked) for number, checked in enumerate(bad)]
    for entry, checked in zip(listing, bad, strict=True):
        suffix = checked.row.file.suffix[:16] if checked.row.file else ""
        entry["file"] = _store_file(folder / f"files/{entry['number']:05d}{suffix}", checked)
    write_file(folder / LISTING, as_csv(listing))
    unreadable = [checked for entry, checked in zip(listing, bad, strict=True) if not entry["file"]]
    # Two damaged tables can have equal listings and different content, so the name depends on both.
    content = [sha256_of(folder / entry["file"]) if entry["file"] else "" for entry in listing]
    return sha256_of_json([listing, content])[:16], unreadable


def write_refused_listing(rows: list[CheckedRow]) -> Path:
    """Write the listing of bad rows of a refused drop, whose files are not moved. Returns its path."""
    listing = [_listing_row(number, checked) for number, checked in enumerate(rows) if checked.outcome == "bad"]
    path = QUARANTINE / f"refused-{sha256_of_json(listing)[:16]}" / LISTING
    write_file(path, as_csv(listing))
    return path


def move_to_quarantine(folder: Path, name: str) -> None:
    """Move a quarantine folder into data/quarantine/; delete it if that name exists, which then has the same rows."""
    QUARANTINE.mkdir(parents=True, exist_ok=True)
    if (QUARANTINE / name).exists():
        shutil.rmtree(folder)
    else:
        folder.rename(QUARANTINE / name)


def read_bytes(row: DropRow) -> bytes | None:
    """Bytes of a row's image; None if they cannot be read any more."""
    try:
        return row.read()
    except DataError:
        return None


def _listing_row(number: int, checked: CheckedRow) -> dict[str, Any]:
    return {
        "number": number,
        "name": checked.row.name,
        "label": checked.row.label,
        "reason": checked.reason,
        "detail": checked.detail,
        "sha256": checked.sha256,
    }


def _store_file(path: Path, checked: CheckedRow) -> str:
    """Store the bytes of a bad row at `path`, as a hard link if possible.

    Returns the path in the quarantine folder, "" if the bytes cannot be read.
    """
    path.parent.mkdir(exist_ok=True)
    file = checked.row.file
    if file is None:
        data = read_bytes(checked.row)
        if not data:
            return ""
        path.write_bytes(data)
    elif not _link_or_copy(file, path):
        return ""
    return f"files/{path.name}"


def _link_or_copy(file: Path, path: Path) -> bool:
    try:
        if not stat.S_ISREG(file.lstat().st_mode) or not os.access(file, os.R_OK):
            return False  # a link, a pipe, or no permission to read
    except OSError:
        return False
    with contextlib.suppress(OSError):  # different file system, no link support, or another user's file
        os.link(file, path)
        return True
    try:
        shutil.copyfile(file, path)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            raise
        return False  # deleted, or no permission to read
    return True

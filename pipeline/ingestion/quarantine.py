"""Quarantine of bad rows: a CSV listing with the reasons, and the bytes of each row."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from pathlib import Path
from typing import Any

from pipeline.ingestion.row_checks import Verdict
from pipeline.shared.artifacts import QUARANTINE, as_csv, sha256_of, sha256_of_json, write_file
from pipeline.shared.errors import DataError

LISTING = "rows.csv"


def write_quarantine(folder: Path, bad: list[Verdict]) -> tuple[str, list[Verdict]]:
    """Write bad rows to `folder`: a listing and the bytes of each.

    Returns a name derived from the content, and the rows whose bytes could not be read; the files of those rows are
    never deleted from the drop folder, only moved.
    """
    folder.mkdir()
    listed = [_listed(number, verdict) for number, verdict in enumerate(bad)]
    for row, verdict in zip(listed, bad, strict=True):
        suffix = verdict.row.file.suffix[:16] if verdict.row.file else ""
        row["file"] = _keep_file(folder / f"files/{row['number']:05d}{suffix}", verdict)
    write_file(folder / LISTING, as_csv(listed))
    alone = [verdict for row, verdict in zip(listed, bad, strict=True) if not row["file"]]
    # Two damaged tables can have equal listings and different content, so the name depends on both.
    content = [sha256_of(folder / row["file"]) if row["file"] else "" for row in listed]
    return sha256_of_json([listed, content])[:16], alone


def list_refused(verdicts: list[Verdict]) -> Path:
    """Write the listing of bad rows of a refused drop, whose files are not moved. Returns its path."""
    listed = [_listed(number, verdict) for number, verdict in enumerate(verdicts) if verdict.outcome == "bad"]
    path = QUARANTINE / f"refused-{sha256_of_json(listed)[:16]}" / LISTING
    write_file(path, as_csv(listed))
    return path


def place_quarantine(folder: Path, name: str) -> None:
    """Move a quarantine folder into data/quarantine/; delete it if that name exists, which then has the same rows."""
    QUARANTINE.mkdir(parents=True, exist_ok=True)
    if (QUARANTINE / name).exists():
        shutil.rmtree(folder)
    else:
        folder.rename(QUARANTINE / name)


def bytes_of(verdict: Verdict) -> bytes | None:
    """Bytes of a row's image; None if they cannot be read any more."""
    try:
        return verdict.row.read()
    except DataError:
        return None


def _listed(number: int, verdict: Verdict) -> dict[str, Any]:
    return {
        "number": number,
        "name": verdict.row.name,
        "label": verdict.row.label,
        "reason": verdict.reason,
        "detail": verdict.detail,
        "sha256": verdict.sha256,
    }


def _keep_file(path: Path, verdict: Verdict) -> str:
    """Store the bytes of a bad row at `path`, as a hard link if possible.

    Returns the path in the quarantine folder, "" if the bytes cannot be read.
    """
    path.parent.mkdir(exist_ok=True)
    file = verdict.row.file
    if file is None:
        data = bytes_of(verdict)
        if not data:
            return ""
        path.write_bytes(data)
    elif not _linked_or_copied(file, path):
        return ""
    return f"files/{path.name}"


def _linked_or_copied(file: Path, path: Path) -> bool:
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

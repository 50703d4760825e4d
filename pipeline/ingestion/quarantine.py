"""Bad rows of a drop, kept where someone can look at them: a listing with the reasons, and the bytes of each row."""

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
    """Bad rows as a listing, and the bytes of each: a name made of their content, and the rows whose bytes were not to be had.

    What the latter come from is never removed from the drop, only moved aside.
    """
    folder.mkdir()
    listed = [_listed(number, verdict) for number, verdict in enumerate(bad)]
    for row, verdict in zip(listed, bad, strict=True):
        suffix = verdict.row.file.suffix[:16] if verdict.row.file else ""
        row["file"] = _keep_file(folder / f"files/{row['number']:05d}{suffix}", verdict)
    write_file(folder / LISTING, as_csv(listed))
    alone = [verdict for row, verdict in zip(listed, bad, strict=True) if not row["file"]]
    # A damaged table is listed alike every day; what is kept of it is not the same.
    content = [sha256_of(folder / row["file"]) if row["file"] else "" for row in listed]
    return sha256_of_json([listed, content])[:16], alone


def list_refused(verdicts: list[Verdict]) -> Path:
    """The listing of a drop that is refused whole, whose files stay where they are."""
    listed = [_listed(number, verdict) for number, verdict in enumerate(verdicts) if verdict.outcome == "bad"]
    path = QUARANTINE / f"refused-{sha256_of_json(listed)[:16]}" / LISTING
    write_file(path, as_csv(listed))
    return path


def place_quarantine(folder: Path, name: str) -> None:
    """Move a quarantine folder to its place; a folder of its name holds the same rows already."""
    QUARANTINE.mkdir(parents=True, exist_ok=True)
    if (QUARANTINE / name).exists():
        shutil.rmtree(folder)
    else:
        folder.rename(QUARANTINE / name)


def bytes_of(verdict: Verdict) -> bytes | None:
    """The bytes of a row's image; None where they are not to be had any more."""
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
    """The bytes of a bad row in the quarantine, by a hard link where that is possible; empty where they are not to be had."""
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
            return False  # a link, a pipe, or what is not ours to read
    except OSError:
        return False
    with contextlib.suppress(OSError):  # another file system, or one without links, or another user's file
        os.link(file, path)
        return True
    try:
        shutil.copyfile(file, path)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            raise
        return False  # gone, or not ours to read
    return True

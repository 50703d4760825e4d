"""One round of ingest on disk: written whole beside the data, then put in place by steps that may be repeated."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from pipeline.artifacts import (
    INGEST_STATE,
    INGESTED,
    QUARANTINE,
    as_csv,
    place_file,
    sha256_of_file,
    sha256_of_json,
    whole_folder,
    write_file,
    write_json,
)
from pipeline.drop_folder import Drop, Stamp, stamp_of
from pipeline.errors import DataError, StageError
from pipeline.ingest_checks import Verdict, reasons
from pipeline.sources.ingested import SCHEMA, new_classes_metadata

ROUND = INGEST_STATE / "round"
PLAN, SHARD, BAD = "plan.json", "shard.parquet", "quarantine"
LISTING = "rows.csv"
TAKEN = ".taken"  # in the drop folder: files whose images were taken in
ROW_GROUP_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Written:
    """What a round holds: names of its shard (None without good rows) and of its quarantine folder, and counts of rows.

    reasons: bad rows by what is wrong. changed: rows whose image is no longer what was judged; they and their files, of a
    table all that it names, wait for the next round.
    """

    shard: str | None
    quarantine: str | None
    added: int
    already_there: int
    quarantined: int
    reasons: dict[str, int]
    changed: int
    new_classes: list[str]


def write_round(drop: Drop, verdicts: list[Verdict], classes: list[str], taken: str) -> Written:
    """Write the shard, the quarantine and the plan of a round into ROUND, which appears whole or not at all."""
    good = [verdict for verdict in verdicts if verdict.outcome == "good"]
    bad = [verdict for verdict in verdicts if verdict.outcome == "bad"]
    with whole_folder(ROUND) as folder:
        kept, changed = write_shard(folder / SHARD, good, classes)
        shard = f"{sha256_of_file(folder / SHARD)}.parquet" if kept else None
        quarantine, alone = write_quarantine(folder / BAD, bad) if bad else (None, [])
        new = sorted({str(verdict.label) for verdict in kept} - set(classes))
        there = len(verdicts) - len(good) - len(bad)
        written = Written(shard, quarantine, len(kept), there, len(bad), reasons(verdicts), len(changed), new)
        left = _files_of(_for_the_next(verdicts, changed), drop)
        files = {path.relative_to(drop.root).as_posix(): stamp for path, stamp in drop.files.items()}
        plan = {
            "drop": str(drop.root.absolute()),
            "remove": sorted(files.keys() - left - _files_of(alone, drop)) if taken == "remove" else [],
            "files": {name: stamp for name, stamp in files.items() if name not in left},
            "written": vars(written),
        }
        write_json(folder / PLAN, plan)
    return written


def _for_the_next(verdicts: list[Verdict], changed: list[Verdict]) -> list[Verdict]:
    """Rows whose files stay in the drop: those that changed, and with a row of a table all that the table names."""
    own = {id(verdict) for verdict in changed}
    tables = {_place(verdict) for verdict in changed}
    return [verdict for verdict in verdicts if id(verdict) in own or _place(verdict) in tables]


def _place(verdict: Verdict) -> str:
    """The table or image that a row comes from, in the drop."""
    return verdict.row.name.partition("#")[0]


def _files_of(verdicts: list[Verdict], drop: Drop) -> set[str]:
    """Files in the drop that rows come from: their table and their image."""
    images = {verdict.row.file for verdict in verdicts if verdict.row.file}
    return {_place(verdict) for verdict in verdicts} | {image.relative_to(drop.root).as_posix() for image in images}


def finish_round() -> Written | None:
    """Put what ROUND holds in its place and clear it: shard, quarantine, files of the drop. None where there is no round.

    Each step is done already or is done now, so that a round killed anywhere between is finished by the next call.
    """
    try:
        plan = json.loads((ROUND / PLAN).read_text(encoding="utf-8"))
        written = Written(**plan["written"])
    except FileNotFoundError:
        shutil.rmtree(ROUND, ignore_errors=True)  # killed while it was cleared, when all was in place
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{ROUND / PLAN}: damaged ({error}); remove {ROUND} and run again") from None
    if written.shard and (ROUND / SHARD).is_file():
        place_file(ROUND / SHARD, INGESTED / written.shard)
    if written.quarantine and (ROUND / BAD).is_dir():
        place_quarantine(ROUND / BAD, written.quarantine)
    _take_away(Path(plan["drop"]), plan)
    shutil.rmtree(ROUND)
    return written


def write_shard(path: Path, good: list[Verdict], classes: list[str]) -> tuple[list[Verdict], list[Verdict]]:
    """Good rows as one Parquet file, in their order: those written, and those whose bytes are no longer what was judged.

    The same rows give the same bytes. No file where nothing was written.
    """
    kept: list[Verdict] = []
    changed: list[Verdict] = []
    group: list[tuple[bytes, str, str, str]] = []
    size = 0
    with pyarrow.parquet.ParquetWriter(path, SCHEMA) as writer:
        for verdict in good:
            data = _bytes_of(verdict)
            if data is None or hashlib.sha256(data).hexdigest() != verdict.sha256:
                changed.append(verdict)
                continue
            kept.append(verdict)
            group.append((data, str(verdict.label), verdict.row.name, verdict.sha256))
            size += len(data)
            if size >= ROW_GROUP_BYTES:
                writer.write_table(_table(group))
                group, size = [], 0
        if group:
            writer.write_table(_table(group))
        writer.add_key_value_metadata(new_classes_metadata(sorted({str(v.label) for v in kept} - set(classes))))
    if not kept:
        path.unlink()
    return kept, changed


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
    content = [sha256_of_file(folder / row["file"]) if row["file"] else "" for row in listed]
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


def _bytes_of(verdict: Verdict) -> bytes | None:
    try:
        return verdict.row.read()
    except DataError:
        return None


def _table(rows: list[tuple[bytes, str, str, str]]) -> pa.Table:
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=SCHEMA)


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
        data = _bytes_of(verdict)
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


def _take_away(root: Path, plan: dict[str, Any]) -> None:
    """Move the files of a round out of the drop, or remove them; one that was written anew since then stays."""
    kept, removed = root / TAKEN / sha256_of_json(plan["files"])[:16], set(plan["remove"])
    for name, stamp in plan["files"].items():
        path = root / name
        if stamp_of(path) != _as_stamp(stamp):
            continue
        if name in removed:
            path.unlink()
        else:
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            path.rename(kept / name)


def _as_stamp(values: list[int]) -> Stamp:
    inode, size, changed = values
    return inode, size, changed

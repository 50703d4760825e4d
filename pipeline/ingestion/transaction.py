"""Transaction of one ingest round: write it to a state folder, then move it into place by repeatable steps."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from pipeline.ingestion.drop_folder import Drop, Stamp, stamp_of
from pipeline.ingestion.quarantine import bytes_of, place_quarantine, write_quarantine
from pipeline.ingestion.row_checks import Verdict, reasons
from pipeline.shared.artifacts import (
    INGEST_STATE,
    INGESTED,
    move_file,
    sha256_of,
    sha256_of_json,
    whole_folder,
    write_json,
)
from pipeline.shared.errors import StageError
from pipeline.sources.ingested import SCHEMA, new_classes_metadata

ROUND = INGEST_STATE / "round"
PLAN, SHARD, BAD = "plan.json", "shard.parquet", "quarantine"
TAKEN = ".taken"  # folder in the drop folder for files that were ingested
ROW_GROUP_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Written:
    """Content of a round: names of its shard (None without good rows) and its quarantine folder, and counts of rows.

    reasons: number of bad rows by reason. changed: rows whose image has changed since the check; they and their files
    (for a table, all files that it names) stay in the drop folder for the next round.
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
    """Write shard, quarantine and plan of a round to the folder ROUND, which is created atomically."""
    good = [verdict for verdict in verdicts if verdict.outcome == "good"]
    bad = [verdict for verdict in verdicts if verdict.outcome == "bad"]
    with whole_folder(ROUND) as folder:
        kept, changed = write_shard(folder / SHARD, good, classes)
        shard = f"{sha256_of(folder / SHARD)}.parquet" if kept else None
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
    """Rows whose files stay in the drop folder: changed rows, and all rows of a table that has a changed row."""
    own = {id(verdict) for verdict in changed}
    tables = {_place(verdict) for verdict in changed}
    return [verdict for verdict in verdicts if id(verdict) in own or _place(verdict) in tables]


def _place(verdict: Verdict) -> str:
    """Path, relative to the drop folder, of the table or image of a row."""
    return verdict.row.name.partition("#")[0]


def _files_of(verdicts: list[Verdict], drop: Drop) -> set[str]:
    """Paths, relative to the drop folder, of the tables and images of some rows."""
    images = {verdict.row.file for verdict in verdicts if verdict.row.file}
    return {_place(verdict) for verdict in verdicts} | {image.relative_to(drop.root).as_posix() for image in images}


def finish_round() -> Written | None:
    """Move shard, quarantine and files of the drop of ROUND into place, and delete ROUND. None if there is no round.

    Each step is skipped if it is done already, so that after a kill at any point the next call completes the round.
    """
    try:
        plan = json.loads((ROUND / PLAN).read_text(encoding="utf-8"))
        written = Written(**plan["written"])
    except FileNotFoundError:
        shutil.rmtree(ROUND, ignore_errors=True)  # left by a kill during the final deletion, when all steps were done
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{ROUND / PLAN}: damaged ({error}); remove {ROUND} and run again") from None
    if written.shard and (ROUND / SHARD).is_file():
        move_file(ROUND / SHARD, INGESTED / written.shard)
    if written.quarantine and (ROUND / BAD).is_dir():
        place_quarantine(ROUND / BAD, written.quarantine)
    _take_away(Path(plan["drop"]), plan)
    shutil.rmtree(ROUND)
    return written


def write_shard(path: Path, good: list[Verdict], classes: list[str]) -> tuple[list[Verdict], list[Verdict]]:
    """Write good rows to one Parquet file, in their order. Returns the written rows and the changed rows.

    A row is changed if its bytes differ from those that were checked. Equal rows give a bit-identical file. Without
    written rows there is no file.
    """
    kept: list[Verdict] = []
    changed: list[Verdict] = []
    group: list[tuple[bytes, str, str, str]] = []
    size = 0
    with pyarrow.parquet.ParquetWriter(path, SCHEMA) as writer:
        for verdict in good:
            data = bytes_of(verdict)
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


def _table(rows: list[tuple[bytes, str, str, str]]) -> pa.Table:
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=SCHEMA)


def _take_away(root: Path, plan: dict[str, Any]) -> None:
    """Move the files of a round out of the drop folder, or delete them; files rewritten since the check stay."""
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

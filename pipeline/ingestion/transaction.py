"""Transaction of one ingest round: write it to a state folder, then move it into place by repeatable steps."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from pipeline.ingestion.drop_folder import Drop, stamp_of
from pipeline.ingestion.quarantine import move_to_quarantine, read_bytes, write_quarantine
from pipeline.ingestion.row_checks import CheckedRow, count_reasons
from pipeline.shared.artifacts import (
    INGEST_STATE,
    INGESTED,
    QUARANTINE,
    move_file,
    sha256_of,
    sha256_of_json,
    whole_folder,
    write_json,
)
from pipeline.shared.errors import StageError
from pipeline.sources.ingested import GROUP, GROUP_KEY, SCHEMA, new_classes_metadata
from serving.shared.terminal import counted

ROUND = INGEST_STATE / "round"
PLAN, SHARD, BAD = "plan.json", "shard.parquet", "quarantine"
TAKEN = ".taken"  # folder in the drop folder for files that were ingested
ROW_GROUP_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class IngestReport:
    """Result of one run of ingest, or of one round.

    shard: the new file of data/ingested/; None if no row was added. already_present: rows that are in the training split
    already, with the same label. quarantined: bad rows, moved to data/quarantine/. reasons: number of bad rows by
    reason. waiting: files that may still be being written, and rows whose image has changed since the check; they stay in
    the drop folder for the next round, for a table with all files that it names. refused: why the whole drop was refused;
    None if it was not. new_classes: classes that first appear in this shard.
    """

    shard: Path | None = None
    added: int = 0
    already_present: int = 0
    quarantined: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    waiting: int = 0
    refused: str | None = None
    new_classes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{counted(self.added, 'image')} added → {self.shard}" if self.shard else "no new data"]
        if self.new_classes:
            parts.append(f"new classes {', '.join(self.new_classes)}")
        if self.already_present:
            parts.append(f"{self.already_present:,} already present")
        if self.quarantined:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.reasons.items())
            parts.append(f"{counted(self.quarantined, 'bad row')} ({reasons}) → {QUARANTINE}")
        if self.waiting:
            parts.append(f"{counted(self.waiting, 'file')} may still be being written and will be read later")
        return f"refused: {self.refused}" if self.refused else "; ".join(parts)


def write_round(drop: Drop, rows: list[CheckedRow], classes: list[str], taken: str, group: str | None = None) -> None:
    """Write shard, quarantine and plan of a round to the folder ROUND, which is created atomically. group: data.group."""
    good = [checked for checked in rows if checked.outcome == "good"]
    bad = [checked for checked in rows if checked.outcome == "bad"]
    with whole_folder(ROUND) as folder:
        added, changed = write_shard(folder / SHARD, good, classes, group)
        shard = f"{sha256_of(folder / SHARD)}.parquet" if added else None
        quarantine, unreadable = write_quarantine(folder / BAD, bad) if bad else (None, [])
        new_classes = sorted({str(checked.label) for checked in added} - set(classes))
        existing = len(rows) - len(good) - len(bad)
        report = IngestReport(
            None, len(added), existing, len(bad), count_reasons(rows), len(changed), new_classes=new_classes
        )
        changed_files = {_file_of(checked) for checked in changed}
        # All rows of a table that has a changed row stay in the drop folder with it.
        deferred = _files_of([checked for checked in rows if _file_of(checked) in changed_files], drop)
        files = {path.relative_to(drop.root).as_posix(): stamp for path, stamp in drop.files.items()}
        plan = {
            "drop": str(drop.root.absolute()),
            "remove": sorted(files.keys() - deferred - _files_of(unreadable, drop)) if taken == "remove" else [],
            "files": {name: stamp for name, stamp in files.items() if name not in deferred},
            "shard": shard,
            "quarantine": quarantine,
            "report": vars(report),
        }
        write_json(folder / PLAN, plan)


def _file_of(checked: CheckedRow) -> str:
    """Path, relative to the drop folder, of the table or image of a row."""
    return checked.row.name.partition("#")[0]


def _files_of(rows: list[CheckedRow], drop: Drop) -> set[str]:
    """Paths, relative to the drop folder, of the tables and images of some rows."""
    images = {checked.row.file for checked in rows if checked.row.file}
    return {_file_of(checked) for checked in rows} | {image.relative_to(drop.root).as_posix() for image in images}


def finish_round() -> IngestReport | None:
    """Move shard, quarantine and files of the drop of ROUND into place, and delete ROUND. None if there is no round.

    Each step is skipped if it is done already, so that after a kill at any point the next call completes the round.
    """
    try:
        plan = json.loads((ROUND / PLAN).read_text(encoding="utf-8"))
        shard = INGESTED / plan["shard"] if plan["shard"] else None
        quarantine = plan["quarantine"]
        report = replace(IngestReport(**plan["report"]), shard=shard)
    except FileNotFoundError:
        shutil.rmtree(ROUND, ignore_errors=True)  # left by a kill during the final deletion, when all steps were done
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f"{ROUND / PLAN}: damaged ({error}); remove {ROUND} and run again") from None
    if shard and (ROUND / SHARD).is_file():
        move_file(ROUND / SHARD, shard)
    if quarantine and (ROUND / BAD).is_dir():
        move_to_quarantine(ROUND / BAD, quarantine)
    _clear_drop(Path(plan["drop"]), plan)
    shutil.rmtree(ROUND)
    return report


def write_shard(
    path: Path, good: list[CheckedRow], classes: list[str], group_setting: str | None = None
) -> tuple[list[CheckedRow], list[CheckedRow]]:
    """Write good rows to one Parquet file, in their order. Returns the written rows and the changed rows.

    A row is changed if its bytes differ from those that were checked. Equal rows give a bit-identical file. Without
    written rows there is no file. group_setting: data.group; the file then has the groups of the images.
    """
    added: list[CheckedRow] = []
    changed: list[CheckedRow] = []
    group: list[tuple[bytes, str, str, str, str | None]] = []
    size = 0
    schema, metadata = SCHEMA, {}
    if group_setting is not None:
        schema, metadata = SCHEMA.append(pa.field(GROUP, pa.string())), {GROUP_KEY: json.dumps(group_setting)}
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        for checked in good:
            data = read_bytes(checked.row)
            if data is None or hashlib.sha256(data).hexdigest() != checked.sha256:
                changed.append(checked)
                continue
            added.append(checked)
            group.append((data, str(checked.label), checked.row.name, checked.sha256, checked.row.group))
            size += len(data)
            if size >= ROW_GROUP_BYTES:
                writer.write_table(_table(group, schema))
                group, size = [], 0
        if group:
            writer.write_table(_table(group, schema))
        metadata |= new_classes_metadata(sorted({str(row.label) for row in added} - set(classes)))
        writer.add_key_value_metadata(metadata)
    if not added:
        path.unlink()
    return added, changed


def _table(rows: list[tuple[bytes, str, str, str, str | None]], schema: pa.Schema) -> pa.Table:
    return pa.table([list(column) for column in zip(*rows, strict=True)][: len(schema)], schema=schema)


def _clear_drop(root: Path, plan: dict[str, Any]) -> None:
    """Move the files of a round out of the drop folder, or delete them; files rewritten since the check stay."""
    taken, removed = root / TAKEN / sha256_of_json(plan["files"])[:16], set(plan["remove"])
    for name, stamp in plan["files"].items():
        path = root / name
        if stamp_of(path) != tuple(stamp):
            continue
        if name in removed:
            path.unlink()
        else:
            (taken / name).parent.mkdir(parents=True, exist_ok=True)
            path.rename(taken / name)

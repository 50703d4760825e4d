"""Ingest labelled images from the drop folder: good rows to one shard of the training data, bad rows to quarantine."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.split_tables import load_classes
from pipeline.ingestion.drop_folder import Drop, read_drop
from pipeline.ingestion.quarantine import list_refused
from pipeline.ingestion.row_checks import Verdict, judge, reasons
from pipeline.ingestion.transaction import Written, finish_round, write_round
from pipeline.params import Params
from pipeline.shared.artifacts import INGEST_STATE, INGESTED, QUARANTINE
from pipeline.shared.errors import ParamsError, StageError
from pipeline.sources import Ingested
from serving.shared.terminal import counted, print


@dataclass(frozen=True)
class IngestReport:
    """Result of one run of ingest.

    shard: the new file of data/ingested/; None if no row was added. already_there: rows that are in the training split
    already, with the same label. quarantined: bad rows, moved to data/quarantine/. reasons: number of bad rows by
    reason. waiting: files that may still be being written. refused: why the whole drop was refused; None if it was not.
    new_classes: classes that first appear in this shard.
    """

    shard: Path | None = None
    added: int = 0
    already_there: int = 0
    quarantined: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    waiting: int = 0
    refused: str | None = None
    new_classes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{counted(self.added, 'image')} added → {self.shard}" if self.shard else "no new data"]
        if self.new_classes:
            parts.append(f"new classes {', '.join(self.new_classes)}")
        if self.already_there:
            parts.append(f"{self.already_there:,} there already")
        if self.quarantined:
            found = ", ".join(f"{reason} {count:,}" for reason, count in self.reasons.items())
            parts.append(f"{counted(self.quarantined, 'bad row')} ({found}) → {QUARANTINE}")
        if self.waiting:
            parts.append(f"{counted(self.waiting, 'file')} may still be being written and will be read later")
        return f"refused: {self.refused}" if self.refused else "; ".join(parts)


def ingest(params: Params, drop: Path | None = None) -> IngestReport:
    """Ingest the images of the drop folder; params.ingest.drop if `drop` is None.

    Good rows are written to one new shard of data/ingested/, bad rows to data/quarantine/ with the reason; ingest.taken
    defines whether their files are kept in the drop folder's `.taken` or deleted. The validation and test splits are
    read, never written. The run is a transaction: after a kill at any point, the next run completes the round or starts
    again. Raises ParamsError if `drop` is not a folder or `split` has not run yet; StageError if another ingest runs.
    """
    from filelock import FileLock, Timeout  # in the extra `pipeline`, which a training machine does not need

    root = Path(params.ingest.drop) if drop is None else drop
    if drop is not None and not drop.is_dir():
        raise ParamsError(f"--drop is {str(drop)!r}, which is not a folder; expected one with a folder per class")
    INGEST_STATE.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(INGEST_STATE / "lock", timeout=0):
            finished = finish_round()
            return _joined(finished, _take_in(params, root))
    except Timeout:
        raise StageError(
            f"{INGEST_STATE / 'lock'}: another ingest holds it; wait for that one to end and run again"
        ) from None


def _take_in(params: Params, root: Path) -> IngestReport:
    if not root.is_dir():
        print(f"ingest: {root}: no such folder; make it, or set ingest.drop", file=sys.stderr)
        return IngestReport()
    ingested = Ingested()
    ingested.check()
    classes = load_classes()
    classes += [name for name in ingested.new_classes if name not in classes]
    found = read_drop(root, params.ingest, classes)
    if not found.rows:
        return IngestReport(waiting=found.waiting)
    verdicts = judge(found.rows, params.ingest, classes, ingested)
    bad = sum(verdict.outcome == "bad" for verdict in verdicts)
    share = params.ingest.min_good_share
    if (len(verdicts) - bad) / len(verdicts) < share:
        listing = list_refused(verdicts)
        return IngestReport(
            reasons=reasons(verdicts),
            waiting=found.waiting,
            refused=f"{bad:,} of {counted(len(verdicts), 'row', 'are')} bad, above what "
            f"ingest.min_good_share = {share:g} allows; "
            f"nothing was taken in, {listing} lists them",
        )
    return _take(found, verdicts, classes, params)


def _take(found: Drop, verdicts: list[Verdict], classes: list[str], params: Params) -> IngestReport:
    write_round(found, verdicts, classes, params.ingest.taken)
    written = finish_round()
    if written is None:
        raise StageError(f"{INGEST_STATE}: the round is gone; leave this folder to ingest and run again")
    return _report(written, found.waiting)


def _report(written: Written, waiting: int = 0) -> IngestReport:
    return IngestReport(
        shard=_shard(written),
        added=written.added,
        already_there=written.already_there,
        quarantined=written.quarantined,
        reasons=written.reasons,
        waiting=waiting + written.changed,
        new_classes=written.new_classes,
    )


def _joined(finished: Written | None, report: IngestReport) -> IngestReport:
    """Add the round of a killed run, which this run completed, to this run's report."""
    if finished is None:
        return report
    print("ingest: finished the round of a run that had been killed", file=sys.stderr)
    before = _report(finished)
    return IngestReport(
        shard=report.shard or before.shard,
        added=before.added + report.added,
        already_there=before.already_there + report.already_there,
        quarantined=before.quarantined + report.quarantined,
        reasons=dict(Counter(before.reasons) + Counter(report.reasons)),
        waiting=report.waiting,
        refused=report.refused,
        new_classes=sorted({*before.new_classes, *report.new_classes}),
    )


def _shard(written: Written) -> Path | None:
    return INGESTED / written.shard if written.shard else None

"""Ingest labelled images from the drop folder: good rows to one shard of the training data, bad rows to quarantine."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

from pipeline.data.split_tables import load_classes
from pipeline.ingestion.drop_folder import read_drop
from pipeline.ingestion.quarantine import write_refused_listing
from pipeline.ingestion.row_checks import check_rows, count_reasons
from pipeline.ingestion.transaction import IngestReport, finish_round, write_round
from pipeline.params import Params
from pipeline.shared.artifacts import INGEST_STATE
from pipeline.shared.errors import ParamsError, StageError
from pipeline.sources import Ingested
from serving.shared.terminal import counted, print


def ingest(params: Params, drop: Path | None = None) -> IngestReport:
    """Ingest the images of the drop folder; params.ingest.drop if `drop` is None.

    Good rows are written to one new shard of data/ingested/, bad rows to data/quarantine/ with the reason; ingest.taken
    defines whether their files are kept in the drop folder's `.taken` or deleted. The validation and test splits are
    read, never written. The run is a transaction: after a kill at any point, the next run completes the round or starts
    again. For task segmentation nothing is ingested. Raises ParamsError if `drop` is not a folder, `split` has not run yet
    or the task is segmentation and there is something to ingest; StageError if another ingest runs.
    """
    if params.task == "segmentation":
        return _without_label_maps(Path(params.ingest.drop), params.data.location, drop)
    from filelock import FileLock, Timeout  # in the extra `pipeline`, which a training machine does not need

    root = Path(params.ingest.drop) if drop is None else drop
    if drop is not None and not drop.is_dir():
        raise ParamsError(f"--drop is {str(drop)!r}, which is not a folder; expected one with a folder per class")
    INGEST_STATE.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(INGEST_STATE / "lock", timeout=0):
            interrupted = finish_round()
            return _merge(interrupted, _ingest_drop(params, root))
    except Timeout:
        raise StageError(
            f"{INGEST_STATE / 'lock'}: another ingest holds it; wait for that one to end and run again"
        ) from None


def _without_label_maps(root: Path, location: str, drop: Path | None) -> IngestReport:
    """The empty report of task segmentation: its new images are added to the source, and `retrain` needs a report.

    Raises ParamsError if `drop` is given or the drop folder has files, because a drop folder has no label maps.
    """
    if drop is not None or (root.is_dir() and any(root.iterdir())):
        raise ParamsError(
            f"{drop or root}: is a drop folder, but task is segmentation; add images with their label maps to "
            f"data.location ({location}) and run `tailor retrain`"
        )
    return IngestReport()


def _ingest_drop(params: Params, root: Path) -> IngestReport:
    if not root.is_dir():
        print(f"ingest: {root}: no such folder; make it, or set ingest.drop", file=sys.stderr)
        return IngestReport()
    ingested = Ingested()
    ingested.check()
    classes = load_classes()
    classes += [name for name in ingested.new_classes if name not in classes]
    drop = read_drop(root, params.ingest, classes, group=params.data.group)
    if not drop.rows:
        return IngestReport(waiting=drop.waiting)
    rows = check_rows(drop.rows, params.ingest, classes, ingested)
    bad = sum(checked.outcome == "bad" for checked in rows)
    min_good_share = params.ingest.min_good_share
    if (len(rows) - bad) / len(rows) < min_good_share:
        return IngestReport(
            reasons=count_reasons(rows),
            waiting=drop.waiting,
            refused=f"{bad:,} of {counted(len(rows), 'row', 'are')} bad, more than ingest.min_good_share = "
            f"{min_good_share:g} allows; nothing was ingested; see {write_refused_listing(rows)}",
        )
    write_round(drop, rows, classes, params.ingest.taken, params.data.group)
    report = finish_round()
    if report is None:
        raise StageError(f"{INGEST_STATE}: another program removed the round; leave this folder to ingest, run again")
    return replace(report, waiting=drop.waiting + report.waiting)


def _merge(interrupted: IngestReport | None, report: IngestReport) -> IngestReport:
    """Add the round of a killed run, which this run completed, to this run's report."""
    if interrupted is None:
        return report
    print("ingest: completed the round of a killed run", file=sys.stderr)
    return replace(
        report,
        shard=report.shard or interrupted.shard,
        added=interrupted.added + report.added,
        already_present=interrupted.already_present + report.already_present,
        quarantined=interrupted.quarantined + report.quarantined,
        reasons=dict(Counter(interrupted.reasons) + Counter(report.reasons)),
        new_classes=sorted({*interrupted.new_classes, *report.new_classes}),
    )

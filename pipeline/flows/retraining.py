"""Prefect flow `retrain`: ingest new images, retrain, and promote the model if the gate passes.

Its tasks are ingest, the DVC stages, gate, publish, verify, promote and rollback. State between runs is on disk (DVC's
lock, the model repository, artifacts/retrain/), never in Prefect only: after a run was killed at any point, the next
run completes it or cleans up.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled, Completed, Failed

from pipeline.data.split_tables import data_sha256
from pipeline.flows import records
from pipeline.flows.dvc_experiments import save_experiment
from pipeline.flows.dvc_stages import CODE, changed_stages, stage_names
from pipeline.flows.prefect_artifacts import PrefectReporter
from pipeline.flows.records import FOLDER, DecisionRecord, Ending, Outcome, RunRecord, gate_sha256
from pipeline.flows.tasks import HOUR, TaskRunner, ingest_images, promote, publish, reproduce_stage, run_gate, verify
from pipeline.ingestion.transaction import IngestReport
from pipeline.params import Params, load_params
from pipeline.shared.artifacts import EXPORT, SPLIT
from pipeline.shared.errors import StageError, TailorError, explain
from pipeline.shared.lineage import code_revision
from serving.promotion import lifecycle
from serving.repository.version_policy import present_versions

LOCK = FOLDER / "lock"
ACTIONABLE = (TailorError, OSError)


class RunInProgress(StageError):
    """Another run holds the lock, and params.retrain.when_busy is refuse."""


def run_name() -> str:
    """Name of the flow run: hashes of data and code; `new` if there is no split yet."""
    data = data_sha256(SPLIT)[:8] if (SPLIT / "test.parquet").is_file() else "new"
    revision, changed, _ = code_revision().partition("+")
    return f"data {data} code {revision[:8]}{changed}"


@flow(name="retrain", flow_run_name=run_name)
def retrain(because: str = "requested by hand", drop: str | None = None) -> State[Any]:
    """Ingest new images, retrain what has changed, and promote the result if the gate passes.

    because: why this run was started, recorded with the decision. drop: a drop folder that replaces params.ingest.drop.
    The name of the returned state is the outcome: Promoted, Refused, Undecided, Unchanged, Skipped, Failed, or
    Cancelled if another run holds the lock.
    """
    logger = get_run_logger()
    started = time.monotonic()
    try:
        params = load_params()
        with run_lock(params.retrain.when_busy, logger.info):
            scheduled = flow_run.get_scheduled_start_time()
            if deployment.get_id() and (later := records.missed_run(scheduled)):
                message = f"missed at {scheduled:%F %T}; replaced by the run of {later.begun}"
                return Completed(name="Skipped", message=message)
            run = RunRecord(records.now().isoformat(), None, because, os.getpid(), None)
            records.write_run(run)
            try:
                outcome = _run_tasks(params, because, Path(drop) if drop else None, PrefectReporter(logger))
            except ACTIONABLE as error:
                outcome = Outcome("failed", explain(error))
            records.write_run(replace(run, ended=records.now().isoformat(), outcome=outcome))
    except RunInProgress as error:
        return Cancelled(message=str(error))
    except ACTIONABLE as error:
        return Failed(message=explain(error))
    logger.info("%s: %s (%.0f s)", outcome.ending, outcome.message, time.monotonic() - started)
    state = Failed if outcome.ending == "failed" else Completed
    return state(name=outcome.ending.capitalize(), message=outcome.message)


@contextmanager
def run_lock(when_busy: str, log: Callable[[str], None]) -> Iterator[None]:
    """Hold the project's lock, which is released when this process ends.

    when_busy: `wait` for another run, or `refuse`, which raises RunInProgress.
    """
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        other = records.read_run("running")
        owner = f"process {other.process}, since {other.begun}" if other else "it has just started"
        if when_busy == "refuse":
            raise RunInProgress(
                f"another retraining is in progress ({owner}); wait for it, or set retrain.when_busy: wait"
            ) from None
        log(f"waits for another retraining ({owner})")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _run_tasks(params: Params, because: str, drop: Path | None, reporter: PrefectReporter) -> Outcome:
    """Run the tasks of one retraining. Raises the errors of the tasks."""
    repository = Path(params.retrain.repository)
    run = TaskRunner(params)
    timeout = params.retrain.stage_hours * HOUR
    names = stage_names()
    if CODE in names:  # stage `code` always runs; the changed stages are known after it
        names.remove(CODE)
        run(reproduce_stage, CODE, timeout, name=CODE)
    if not (SPLIT / "classes.json").is_file():  # ingest reads the classes from it
        run(reproduce_stage, names[0], timeout, name=names[0])
    report = run(ingest_images, params, drop)
    champion = lifecycle.champion_or_none(repository)
    before = champion.version if champion else None
    if not changed_stages(names) and (unchanged := _unchanged(params, before, report)):
        return unchanged
    for name in names:
        run(reproduce_stage, name, timeout, name=name)
    release = lifecycle.export_identity(EXPORT)
    reporter.report_name(run_name())
    if champion and lifecycle.identity(champion.manifest) == release:
        # An earlier run promoted this release and was killed, possibly before the servers loaded it.
        servers = _promote(run, params, champion.version, release, None)
        serves = _serves(champion.version, None, servers, repository)
        return Outcome("promoted", f"{serves}; an earlier run promoted it", champion.version)
    run_info = {"because": because, "release": release, "data_sha256": data_sha256(SPLIT), "compared_with": before,
                "code_revision": code_revision(), "run": flow_run.get_name(), "ingest": str(report)}  # fmt: skip
    decision, evidence = run(run_gate, params, champion, run_info)
    reporter.report_decision(decision, evidence)
    if decision.promote:
        outcome = _publish(run, params, evidence, release, before)
    else:
        ending: Ending = "undecided" if decision.undecided else "refused"
        outcome = Outcome(ending, "; ".join(decision.reasons), before, str(evidence))
        if decision.computed:  # else the next run repeats the gate, because a missing file may exist by then
            record = DecisionRecord(release, before, gate_sha256(params.gate), ending, None)
            _record_decision(record, outcome.message, params)
    reporter.report_outcome(outcome)
    records.prune(evidence)
    return outcome


def _publish(run: TaskRunner, params: Params, evidence: Path, release: str, before: int | None) -> Outcome:
    """Publish, verify and promote the exported release; withdraw its version if it cannot be promoted."""
    repository = Path(params.retrain.repository)
    existing = present_versions(repository)
    version = run(publish, params, evidence)
    try:
        rehearsed = run(verify, params, version)
        servers = _promote(run, params, version, release, before)
    except ACTIONABLE:
        if version not in existing:  # a version that existed before this run stays as a target for rollback
            lifecycle.withdraw(repository, version)
        raise
    where = "on a separate server" if rehearsed else "in ONNX Runtime only (dry run)"
    serves = _serves(version, before, servers, repository)
    return Outcome("promoted", f"{serves}; it was tested {where}", version, str(evidence))


def _promote(run: TaskRunner, params: Params, version: int, release: str, before: int | None) -> tuple[str, ...]:
    """Promote a version and record the decision. Returns the servers that serve it. Raises the errors of `promote`."""
    gate = gate_sha256(params.gate)
    try:
        servers = run(promote, params, version)
    except lifecycle.RolledBack as error:
        rolled_back = DecisionRecord(release, error.before, gate, "refused", None)
        records.write_decision(rolled_back)  # first, so that the next run cannot promote it again
        save_experiment(rolled_back, str(error), params, get_run_logger().info)
        raise
    instead = f" instead of {before}" if before else ""
    record = DecisionRecord(release, before, gate, "promoted", version)
    _record_decision(record, f"version {version}{instead}", params)
    return servers


def _record_decision(record: DecisionRecord, reason: str, params: Params) -> None:
    """Save the experiment, then the decision: if the run is killed in between, the next run decides again."""
    save_experiment(record, reason, params, get_run_logger().info)
    records.write_decision(record)


def _unchanged(params: Params, champion: int | None, report: IngestReport) -> Outcome | None:
    """Outcome `unchanged` if the exported release already has a decision; else None. All stages are up to date."""
    record = records.read_decision()
    if not record or not record.already_decided(lifecycle.export_identity(EXPORT), champion, params.gate):
        return None
    decision = {"undecided": "undecided, because the test images are too few", "refused": "refused"}
    earlier = decision.get(record.ending, f"promoted as version {record.version}")
    refused = f"; the drop was {report}" if report.refused else ""
    return Outcome("unchanged", f"no new data and no changed params; their release was {earlier}{refused}", champion)


def _serves(version: int, before: int | None, servers: tuple[str, ...], repository: Path) -> str:
    instead = f" instead of {before}" if before else ""
    where = f"at {', '.join(servers)}" if servers else f"once a server starts on {repository}; no server runs on it now"
    return f"version {version} answers{instead}, {where}"

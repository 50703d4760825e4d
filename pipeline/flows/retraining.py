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
from pipeline.flows.dvc_experiments import keep_run
from pipeline.flows.dvc_stages import CODE, changed_stages, stage_names
from pipeline.flows.prefect_artifacts import Teller
from pipeline.flows.records import (
    FOLDER,
    Decided,
    Ending,
    Outcome,
    Run,
    gate_sha256,
    missed,
    now,
    prune,
    read_decided,
    read_run,
    write_decided,
    write_run,
)
from pipeline.flows.tasks import HOUR, Steps, hold_gate, ingest_images, promote, publish, reproduce_stage, verify
from pipeline.ingestion.ingest import IngestReport
from pipeline.params import Params, load_params
from pipeline.shared.artifacts import EXPORT, SPLIT
from pipeline.shared.errors import StageError, TailorError, explain
from pipeline.shared.lineage import code_revision
from serving.promotion import lifecycle
from serving.repository.release import Release
from serving.repository.version_policy import present_versions

LOCK = FOLDER / "lock"
HOW = {"undecided": "not decided on for want of test images"}  # text for endings other than promoted and refused
ACTIONABLE = (TailorError, OSError)


class Busy(StageError):
    """Another run holds the lock, and params.retrain.when_busy is refuse."""


def run_name() -> str:
    """Name of the flow run: hashes of data and code before ingest; `new` if there is no split yet."""
    data = data_sha256(SPLIT)[:8] if (SPLIT / "test.parquet").is_file() else "new"
    return f"data {data} code {_code()}"


@flow(name="retrain", flow_run_name=run_name)
def retrain(because: str = "requested by hand", drop: str | None = None) -> State[Any]:
    """Ingest new images, retrain what has changed, and promote the result if the gate passes.

    because: why this run was started, recorded with the decision. drop: a drop folder that replaces params.ingest.drop.
    The name of the returned state is the outcome: Promoted, Refused, Undecided, Unchanged, Skipped, Failed, or
    Cancelled if another run holds the lock.
    """
    logger = get_run_logger()
    begun = time.monotonic()
    try:
        params = load_params()
        with one_at_a_time(params.retrain.when_busy, logger.info):
            scheduled = flow_run.get_scheduled_start_time()
            if deployment.get_id() and (done := missed(scheduled)):
                return Completed(
                    name="Skipped", message=f"missed at {scheduled:%F %T} and caught up by the run of {done.begun}"
                )
            run = Run(now().isoformat(), None, because, os.getpid(), None)
            write_run(run)
            try:
                outcome = _run(params, because, Path(drop) if drop else None, Teller(logger))
            except ACTIONABLE as error:
                outcome = Outcome("failed", explain(error))
            write_run(replace(run, ended=now().isoformat(), outcome=outcome))
    except Busy as error:
        return Cancelled(message=str(error))
    except ACTIONABLE as error:
        return Failed(message=explain(error))
    logger.info("%s: %s (%.0f s)", outcome.ending, outcome.message, time.monotonic() - begun)
    state = Failed if outcome.ending == "failed" else Completed
    return state(name=outcome.ending.capitalize(), message=outcome.message)


@contextmanager
def one_at_a_time(when_busy: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the project's lock, which is released when this process ends.

    when_busy: `wait` for another run, or `refuse`, which raises Busy.
    """
    LOCK.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        other = read_run("running")
        who = f"process {other.process}, since {other.begun}" if other else "it has just begun"
        if when_busy == "refuse":
            raise Busy(
                f"another retraining is under way ({who}); wait for it, or set retrain.when_busy: wait"
            ) from None
        say(f"waits for another retraining ({who})")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _run(params: Params, because: str, drop: Path | None, teller: Teller) -> Outcome:
    """Run the tasks of one retraining. Raises the errors of the tasks."""
    repository = Path(params.retrain.repository)
    step = Steps(params)
    limit = params.retrain.stage_hours * HOUR
    names = stage_names()
    if CODE in names:  # stage `code` always runs; the changed stages are known after it
        names.remove(CODE)
        step(reproduce_stage, CODE, limit, name=CODE)
    if not (SPLIT / "classes.json").is_file():  # ingest reads the classes from it
        step(reproduce_stage, names[0], limit, name=names[0])
    taken = step(ingest_images, params, drop)
    champion = lifecycle.champion_or_none(repository)
    if not changed_stages(names) and (settled := _settled(params, champion)):
        return replace(settled, message=f"{settled.message}{_of_ingest(taken)}")
    for name in names:
        step(reproduce_stage, name, limit, name=name)
    release = lifecycle.export_identity(EXPORT)
    data = data_sha256(SPLIT)
    teller.name(f"data {data[:8]} code {_code()}")
    if champion and lifecycle.identity(champion.manifest) == release:
        # An earlier run promoted this release and was killed, possibly before the servers loaded it.
        servers = _go_live(step, params, champion.version, release, None)
        return Outcome(
            "promoted",
            f"version {champion.version} answers, {_where(servers, repository)}; an earlier run promoted it",
            champion.version,
        )
    story = {"because": because, "release": release, "data_sha256": data, "code_revision": code_revision(),
             "compared_with": champion and champion.version, "run": flow_run.get_name(), "ingest": str(taken)}  # fmt: skip
    decision, evidence = step(hold_gate, params, champion, story)
    teller.decision(decision, evidence)
    against = champion.version if champion else None
    if not decision.promote:
        ending: Ending = "undecided" if decision.undecided else "refused"
        outcome = Outcome(ending, "; ".join(decision.reasons), against, str(evidence))
        if decision.computed:  # else the next run repeats the gate, because a missing file may exist by then
            _keep(Decided(release, against, gate_sha256(params.gate), ending, None), outcome.message, params)
    else:
        kept = present_versions(repository)
        version = step(publish, params, evidence)
        try:
            rehearsed = step(verify, params, version)
            servers = _go_live(step, params, version, release, against)
        except ACTIONABLE:
            if version not in kept:  # a version that existed before this run stays as a target for rollback
                lifecycle.withdraw(repository, version)
            raise
        outcome = Outcome(
            "promoted", _promoted(version, against, rehearsed, servers, repository), version, str(evidence)
        )
    teller.outcome(outcome)
    prune(evidence)
    return outcome


def _go_live(step: Steps, params: Params, version: int, release: str, against: int | None) -> tuple[str, ...]:
    """Promote a version and record the decision. Returns the servers that serve it. Raises the errors of `promote`."""
    gate = gate_sha256(params.gate)
    try:
        servers = step(promote, params, version)
    except lifecycle.RolledBack as error:
        rolled_back = Decided(release, error.before, gate, "refused", None)
        write_decided(rolled_back)  # first, so that the next run cannot promote it again
        keep_run(rolled_back, str(error), params, get_run_logger().info)
        raise
    instead = f" instead of {against}" if against else ""
    _keep(Decided(release, against, gate, "promoted", version), f"version {version}{instead}", params)
    return servers


def _keep(decided: Decided, why: str, params: Params) -> None:
    """Save the experiment, then the decision: if the run is killed in between, the next run decides again."""
    keep_run(decided, why, params, get_run_logger().info)
    write_decided(decided)


def _settled(params: Params, champion: Release | None) -> Outcome | None:
    """Outcome `unchanged` if the exported release already has a decision; else None. All stages are up to date."""
    against = champion.version if champion else None
    decided = read_decided()
    if decided and decided.settles(lifecycle.export_identity(EXPORT), against, params.gate):
        how = f"promoted as version {decided.version}" if decided.version else HOW.get(decided.ending, "refused")
        return Outcome("unchanged", f"no new data and no changed params; what they make was {how} before", against)
    return None


def _promoted(version: int, before: int | None, rehearsed: bool, servers: tuple[str, ...], repository: Path) -> str:
    trial = "on a server of its own" if rehearsed else "in ONNX Runtime alone (dry run)"
    instead = f" instead of {before}" if before else ""
    return f"version {version} answers{instead}, {_where(servers, repository)}; it was tried {trial}"


def _where(servers: tuple[str, ...], repository: Path) -> str:
    return f"at {', '.join(servers)}" if servers else f"once a server starts on {repository}; none runs on it now"


def _of_ingest(taken: IngestReport) -> str:
    """Text about a refused drop folder for the outcome of an unchanged run; empty if the drop was not refused."""
    return f"; the drop was {taken}" if taken.refused else ""


def _code() -> str:
    revision, changed, _ = code_revision().partition("+")
    return f"{revision[:8]}{changed}"

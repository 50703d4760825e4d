"""The Prefect flow `retrain`: new data in, a better model live, or nothing changed.

Its tasks are the stages of DVC and, around them, ingest, gate, publish, verify, promote and rollback. What a run needs to
know of earlier ones is on disk (DVC's lock, the repository, artifacts/retrain/), never in Prefect alone: a run that was
killed at any point is finished, or cleaned up after, by the next one.
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
HOW = {"undecided": "not decided on for want of test images"}  # how a release ended that was not promoted, in words
ACTIONABLE = (TailorError, OSError)


class Busy(StageError):
    """Another run is under way, and params.retrain.when_busy is refuse."""


def run_name() -> str:
    """Data and code versions, as far as they are known before the run has taken anything in."""
    data = data_sha256(SPLIT)[:8] if (SPLIT / "test.parquet").is_file() else "new"
    return f"data {data} code {_code()}"


@flow(name="retrain", flow_run_name=run_name)
def retrain(because: str = "requested by hand", drop: str | None = None) -> State[Any]:
    """Take in what is new, retrain what has changed, and promote the result where the gate lets it.

    because: why this run was started, kept with the decision. drop: a drop folder in the place of params.ingest.drop.
    The state's name is how it ended: Promoted, Refused, Undecided, Unchanged, Skipped; Cancelled where
    another run is under way.
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
    """Hold the project's lock, which ends with this process. Raises Busy where another holds it and shall not be waited for."""
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
    """One run, by its tasks. Raises what they raise."""
    repository = Path(params.retrain.repository)
    step = Steps(params)
    limit = params.retrain.stage_hours * HOUR
    names = stage_names()
    if CODE in names:  # it always runs; what has changed is known after it
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
        # Its servers may not have loaded it yet: the run that promoted it was ended, maybe while they loaded it.
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
        if decision.computed:  # else the next run holds the gate again: what was missing may be there by then
            _keep(Decided(release, against, gate_sha256(params.gate), ending, None), outcome.message, params)
    else:
        kept = present_versions(repository)
        version = step(publish, params, evidence)
        try:
            rehearsed = step(verify, params, version)
            servers = _go_live(step, params, version, release, against)
        except ACTIONABLE:
            if version not in kept:  # a version of old that was best again is still one to roll back to
                lifecycle.withdraw(repository, version)
            raise
        outcome = Outcome(
            "promoted", _promoted(version, against, rehearsed, servers, repository), version, str(evidence)
        )
    teller.outcome(outcome)
    prune(evidence)
    return outcome


def _go_live(step: Steps, params: Params, version: int, release: str, against: int | None) -> tuple[str, ...]:
    """Promote a version and keep that it was; the servers that answer with it. Raises as the task does."""
    gate = gate_sha256(params.gate)
    try:
        servers = step(promote, params, version)
    except lifecycle.RolledBack as error:
        rolled_back = Decided(release, error.before, gate, "refused", None)
        write_decided(rolled_back)  # at once, or the next run might promote it again
        keep_run(rolled_back, str(error), params, get_run_logger().info)
        raise
    instead = f" instead of {against}" if against else ""
    _keep(Decided(release, against, gate, "promoted", version), f"version {version}{instead}", params)
    return servers


def _keep(decided: Decided, why: str, params: Params) -> None:
    """Keep what became of a release, as an experiment first: a run that is ended in between is decided on once more."""
    keep_run(decided, why, params, get_run_logger().info)
    write_decided(decided)


def _settled(params: Params, champion: Release | None) -> Outcome | None:
    """The outcome of a run that finds all stages up to date and their release decided on; None where it is not."""
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
    """The text on the drop folder for the end of a run that had nothing to do."""
    return f"; the drop was {taken}" if taken.refused else ""


def _code() -> str:
    revision, changed, _ = code_revision().partition("+")
    return f"{revision[:8]}{changed}"

"""Prefect tasks of the flow `retrain`, with retries and timeouts: ingest, stage, gate, publish, verify, promote."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.client.schemas.objects import State
from prefect.tasks import exponential_backoff
from prefect.utilities.annotations import quote

from pipeline.evaluation.gate import Decision
from pipeline.evaluation.predictions import GateError
from pipeline.flows.dvc_stages import MISUSE, StageFailed, reproduce
from pipeline.flows.evidence import write_evidence
from pipeline.ingestion.ingest import ingest
from pipeline.ingestion.transaction import IngestReport
from pipeline.params import Params
from pipeline.shared.artifacts import EXPORT
from serving.promotion import lifecycle
from serving.repository.manifest import ManifestError
from serving.repository.release import Release
from serving.server.running import servers_at
from serving.shared.errors import RepositoryError

HOUR = 3600.0  # seconds
MARGIN = 60.0  # seconds added to Prefect's timeout: the stage's own timeout comes first, and its error names the cause
PERMANENT = (GateError, ManifestError, RepositoryError, lifecycle.RolledBack)  # a retry would fail with the same error


def should_retry(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a retry of the failed task may succeed."""
    error = state.data
    status = error.status if isinstance(error, StageFailed) else getattr(error, "exit_code", None)
    return status != MISUSE and not isinstance(error, PERMANENT)


@task(name="ingest")
def ingest_images(params: Params, drop: Path | None) -> IngestReport:
    """Ingest the drop folder, after completing the round of a killed run."""
    report = ingest(params, drop)
    get_run_logger().info("ingest: %s", report)
    return report


@task(name="stage", task_run_name="{name}")
def reproduce_stage(name: str, timeout: float) -> bool:
    """Reproduce one DVC stage. Returns False if the stage was up to date."""
    return reproduce(name, get_run_logger().info, timeout)


@task(name="gate")
def run_gate(params: Params, champion: Release | None, run_info: dict[str, Any]) -> tuple[Decision, Path]:
    """Run the gate on the challenger. Returns the decision and the folder of evidence."""
    return write_evidence(params, champion, run_info)


@task(name="publish")
def publish(params: Params, evidence: Path) -> int:
    """Write the challenger as the next version, which no server loads yet. Returns the version number."""
    return lifecycle.publish(EXPORT, Path(params.retrain.repository), evidence)


@task(name="verify")
def verify(params: Params, version: int) -> bool:
    """Test the version apart from the production servers. Returns True if a separate server was used."""
    settings = params.retrain
    return lifecycle.verify(Path(settings.repository), version, settings.load_seconds, settings.rehearsal)


@task(name="promote")
def promote(params: Params, version: int) -> tuple[str, ...]:
    """Make the version the champion and monitor it. Returns the addresses of the servers that serve it.

    If its responses are wrong, the task `rollback` restores the previous champion. Raises the errors of
    `lifecycle.go_live`.
    """
    settings = params.retrain
    return lifecycle.go_live(
        Path(settings.repository),
        version,
        settings.server,
        keep=settings.keep,
        timeout=settings.load_seconds,
        watch_seconds=settings.watch_seconds,
        undo=lambda before: roll_back.with_options(**task_options(params, roll_back))(params, before),
    )


@task(name="rollback")
def roll_back(params: Params, version: int) -> None:
    """Restore the previous champion."""
    settings = params.retrain
    repository = Path(settings.repository)
    servers = servers_at(repository, settings.server)
    lifecycle.roll_back(repository, version, servers, settings.keep, settings.load_seconds)


class TaskRunner:
    """Runs tasks with the retries and timeouts of params.retrain, and logs the start and end of each."""

    def __init__(self, params: Params) -> None:
        self._params = params
        self._logger = get_run_logger()

    def __call__(self, flow_task: Any, *arguments: Any, name: str | None = None) -> Any:
        name = name or flow_task.name
        self._logger.info("%s: starts", name)
        started = time.monotonic()
        # quote: Prefect does not search the arguments for futures. It takes a section with a key `keys` for a mapping.
        result = flow_task.with_options(**task_options(self._params, flow_task))(*map(quote, arguments))
        self._logger.info("%s: done (%.1f s)", name, time.monotonic() - started)
        return result


def task_options(params: Params, flow_task: Any) -> dict[str, Any]:
    """Retry and timeout options of a task. The gate has no retries: if it cannot be computed, it refuses."""
    settings = params.retrain
    return {
        "retries": 0 if flow_task is run_gate else settings.retries,
        "retry_delay_seconds": exponential_backoff(settings.retry_seconds),
        "retry_condition_fn": should_retry,
        "timeout_seconds": settings.stage_hours * HOUR + MARGIN,
    }

"""The tasks of `retrain`: one for each stage of DVC, and what surrounds them; how often each is tried, how long it may take."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.client.schemas.objects import State
from prefect.tasks import exponential_backoff

from pipeline.evaluation.gate import Decision
from pipeline.evaluation.predictions import GateError
from pipeline.flows import evidence as files
from pipeline.flows.dvc_stages import MISUSE, StageFailed, reproduce
from pipeline.ingestion.ingest import IngestReport, ingest
from pipeline.params import Params
from pipeline.shared.artifacts import EXPORT
from pipeline.shared.errors import TailorError
from serving.promotion import lifecycle
from serving.repository.manifest import ManifestError
from serving.repository.release import Release
from serving.server.running import servers_at
from serving.shared.errors import RepositoryError

HOUR = 3600.0  # seconds
SPARE = 60.0  # seconds that Prefect waits longer than a limit of ours, whose error names the cause
HOPELESS = (
    GateError,
    ManifestError,
    RepositoryError,
    lifecycle.RolledBack,
)  # a retry would fail in the same way


def worth_retrying(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a retry of the failed task may succeed."""
    error = state.data
    if isinstance(error, TailorError) and error.exit_code == MISUSE:
        return False
    if isinstance(error, StageFailed) and error.status == MISUSE:
        return False
    return not isinstance(error, HOPELESS)


@task(name="ingest")
def ingest_images(params: Params, drop: Path | None) -> IngestReport:
    """Take in what lies in the drop folder, and finish what a killed run began to take in."""
    report = ingest(params, drop)
    get_run_logger().info("ingest: %s", report)
    return report


@task(name="stage", task_run_name="{name}")
def reproduce_stage(name: str, limit: float) -> bool:
    """Reproduce one stage of DVC; whether there was anything to do."""
    return reproduce(name, get_run_logger().info, limit)


@task(name="gate")
def hold_gate(params: Params, champion: Release | None, story: dict[str, Any]) -> tuple[Decision, Path]:
    """Decide on the challenger; the decision, and the folder of evidence that holds it."""
    return files.gather(params, champion, story)


@task(name="publish")
def publish(params: Params, evidence: Path) -> int:
    """Write the challenger as the next version, which no server loads yet; its number."""
    return lifecycle.publish(EXPORT, Path(params.retrain.repository), evidence)


@task(name="verify")
def verify(params: Params, version: int) -> bool:
    """Try the version apart from the servers of users; whether on a server of its own."""
    settings = params.retrain
    return lifecycle.verify(Path(settings.repository), version, settings.load_seconds, settings.rehearsal)


@task(name="promote")
def promote(params: Params, version: int) -> tuple[str, ...]:
    """Make the version the champion, and watch it; the addresses of the servers that answer with it.

    Where it answers wrongly after all, the task `rollback` makes the champion before it the champion again. Raises as
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
        undo=lambda before: roll_back.with_options(**options(params, roll_back))(params, before),
    )


@task(name="rollback")
def roll_back(params: Params, version: int) -> None:
    """Make the champion of before the champion again."""
    settings = params.retrain
    repository = Path(settings.repository)
    elsewhere = servers_at(repository, settings.server)
    lifecycle.roll_back(repository, version, elsewhere, settings.keep, settings.load_seconds)


class Steps:
    """Runs tasks under the retries and limits of params.retrain, and logs the start and end of each."""

    def __init__(self, params: Params) -> None:
        self._params = params
        self._logger = get_run_logger()

    def __call__(self, step: Any, *arguments: Any, name: str | None = None) -> Any:
        name = name or step.name
        self._logger.info("%s: starts", name)
        begun = time.monotonic()
        result = step.with_options(**options(self._params, step))(*arguments)
        self._logger.info("%s: done (%.1f s)", name, time.monotonic() - begun)
        return result


def options(params: Params, step: Any) -> dict[str, Any]:
    """How often a task is tried, and how long it may take. The gate gets one try: what it cannot compute it refuses."""
    settings = params.retrain
    return {
        "retries": 0 if step is hold_gate else settings.retries,
        "retry_delay_seconds": exponential_backoff(settings.retry_seconds),
        "retry_condition_fn": worth_retrying,
        "timeout_seconds": settings.stage_hours * HOUR + SPARE,
    }

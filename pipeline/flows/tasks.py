"""The tasks of `retrain`: one for each stage of DVC, and what surrounds them; how often each is tried, how long it may take."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.client.schemas.objects import State
from prefect.tasks import exponential_backoff

from pipeline.artifacts import EXPORT
from pipeline.errors import StageError
from pipeline.flows import evidence as files
from pipeline.flows import publish as releases
from pipeline.flows.stages import MISUSE, StageFailed, reproduce
from pipeline.gate import Decision, GateError
from pipeline.ingest import IngestReport, ingest
from pipeline.params import Params
from serving.errors import InputError, ServingError
from serving.manifest import ManifestError
from serving.model_config import RepositoryError
from serving.running import servers_at
from serving.version_policy import version_before

HOUR = 3600.0  # seconds
SPARE = 60.0  # seconds that Prefect waits longer than a limit of ours, which says more when it is passed
HOPELESS = (
    GateError,
    InputError,
    ManifestError,
    RepositoryError,
    releases.TakenBack,
)  # trying again would end the same


def worth_retrying(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a task that failed so may do better the next time."""
    error = state.data
    if isinstance(error, StageError) and error.exit_code == MISUSE:
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
def hold_gate(params: Params, champion: releases.Champion | None, story: dict[str, Any]) -> tuple[Decision, Path]:
    """Decide on the challenger; the decision, and the folder of evidence that holds it."""
    return files.gather(params, champion, story)


@task(name="publish")
def publish(params: Params, evidence: Path) -> int:
    """Write the challenger as the next version, which nobody serves yet; its number."""
    return releases.publish(EXPORT, Path(params.retrain.repository), evidence)


@task(name="verify")
def verify(params: Params, version: int) -> bool:
    """Try the version apart from whoever serves; whether on a server of its own."""
    settings = params.retrain
    return releases.verify(Path(settings.repository), version, settings.load_seconds, settings.rehearsal)


@task(name="promote")
def promote(params: Params, version: int) -> tuple[str, ...]:
    """Make the version the champion, and watch it; the servers that answer with it.

    Where it does not answer rightly after all, the champion of before answers again, and TakenBack says why. A version
    that is the champion by an earlier try, or by a run that was ended, is loaded where it is not yet, and watched too.
    """
    settings = params.retrain
    repository = Path(settings.repository)
    elsewhere = servers_at(repository, settings.server)
    champion = releases.find_champion(repository)
    done = releases.promote(repository, version, elsewhere, settings.keep, settings.load_seconds)
    try:
        servers = releases.servers_of(repository, settings.server)
        releases.watch(repository, version, servers, settings.watch_seconds)
    except ServingError as error:
        changed = champion is not None and champion.version != version  # or an earlier try of this task did it
        before = champion.version if changed else version_before(repository)
        if before is None:
            raise
        roll_back.with_options(**options(params, roll_back))(params, before)
        raise releases.TakenBack(
            f"version {version} was promoted and taken back, {before} answers: {error}", before
        ) from error
    return done.servers


@task(name="rollback")
def roll_back(params: Params, version: int) -> None:
    """Make the champion of before the champion again."""
    settings = params.retrain
    repository = Path(settings.repository)
    elsewhere = servers_at(repository, settings.server)
    releases.roll_back(repository, version, elsewhere, settings.keep, settings.load_seconds)


class Steps:
    """Runs tasks under the retries and limits of params.retrain, and says where the run is."""

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

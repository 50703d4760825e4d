"""How a retraining is started: here and now, or by asking the schedule that runs for this project.

Prefect is imported inside the functions, as it reads its settings when it is first imported.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from pipeline.flows.records import Outcome, read_run
from pipeline.scheduling.prefect_server import (
    HOME,
    PrefectServerError,
    given_server,
    running_server,
    settle_environment,
    some_server,
    talking_to,
    without_password,
)
from pipeline.shared.errors import StageError

NAME = "schedule"  # of the deployment that `tailor schedule` serves
DEPLOYMENT = f"retrain/{NAME}"


def trigger_retrain(reason: str, home: Path = HOME) -> str:
    """Have the project retrained because of `reason`; what was done, in one sentence.

    Where `tailor schedule` runs, or PREFECT_API_URL names a server with its deployment, that is asked and this returns at
    once; a run that was asked for and has not begun is not asked for twice. Else the run takes place here, and this
    returns at its end. Raises StageError where the run failed, or the server that PREFECT_API_URL names does not answer.
    """
    settle_environment(home)
    url = given_server() or running_server(home)
    if url:
        with talking_to(url):
            asked = _ask_schedule(url, reason)
        if asked:
            return asked
    outcome = run_once(reason, home=home)
    if outcome.ending == "failed":
        raise StageError(outcome.message)
    return f"{outcome.ending}: {outcome.message}"


def run_once(because: str, drop: Path | None = None, home: Path = HOME, tracebacks: bool = False) -> Outcome:
    """Run the flow in this process, under a temporary Prefect server where no other is there; how it ended.

    tracebacks: whether Prefect's log shows them; what a user can act on is in the outcome's one line. Raises StageError
    where Prefect's server cannot be started, or the one that PREFECT_API_URL names does not answer.
    """
    with some_server(home):
        import httpx
        from prefect.logging.handlers import APILogHandler

        from pipeline.flows.retraining import retrain

        if not tracebacks:
            _hide_tracebacks()
        try:
            state = retrain(because, drop and str(drop), return_state=True)
        except httpx.HTTPError as error:
            # The server went away and could not be told the end; the run itself may have come to one.
            last = read_run("last")
            if last is None or last.process != os.getpid() or last.outcome is None:
                raise StageError(f"Prefect's server does not answer: {error}") from error
            return last.outcome
        APILogHandler().flush()  # while the server is there to take it
        if state.is_cancelled():
            return Outcome("busy", state.message or "another retraining is under way")
        last = read_run("last")
        if state.name == "Skipped" or last is None or last.outcome is None or last.process != os.getpid():
            return Outcome("failed" if state.is_failed() or state.is_crashed() else "skipped", state.message or "")
        return last.outcome


def _ask_schedule(url: str, reason: str) -> str | None:
    """Ask the deployment for a run; None where the server has no such deployment. Raises PrefectServerError."""
    import httpx

    try:
        return _create_run(reason)
    except httpx.HTTPError as error:
        said = " ".join(str(error).split())
        raise PrefectServerError(
            f"Prefect's server at {without_password(url)} was asked for a retraining and did not take it: {said}"
        ) from error


def _create_run(reason: str) -> str | None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound:
            return None
        wanted = {"deployment_id": {"any_": [deployment.id]}, "state": {"type": {"any_": ["SCHEDULED", "PENDING"]}}}
        waiting = client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(wanted))
        if any(not run.auto_scheduled for run in waiting):
            return "a retraining was asked for already and has not begun"
        run = client.create_flow_run_from_deployment(deployment.id, parameters={"because": reason})
    return f"the schedule was asked for a retraining, run {run.name!r}"


class _OneLine(logging.Filter):
    """Takes the traceback off a record; its message says what happened."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass."""
        record.exc_info = record.exc_text = None
        return True


def _hide_tracebacks() -> None:
    loggers: list[Any] = [logging.getLogger(name) for name in ("prefect", "prefect.flow_runs", "prefect.task_runs")]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        handler.addFilter(_OneLine())

"""Start a retraining: in this process, or as a run of the schedule that runs for this project.

Prefect is imported inside the functions, because it reads its settings when it is first imported.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from pipeline.flows.records import Outcome, read_run
from pipeline.scheduling.prefect_server import (
    PrefectServerError,
    configured_server,
    ensure_server,
    running_server,
    set_prefect_env,
    use_api,
    without_password,
)
from pipeline.shared.errors import StageError

NAME = "schedule"  # of the deployment that `tailor schedule` serves
DEPLOYMENT = f"retrain/{NAME}"


def trigger_retrain(reason: str) -> str:
    """Start a retraining of the project for `reason`. Returns a sentence that describes what was done.

    If `tailor schedule` runs, or PREFECT_API_URL names a server with its deployment, the function requests a run there
    and returns at once; if a requested run has not begun yet, it requests no second one. Otherwise it runs the flow in
    this process and returns at its end. Raises StageError if the run failed or the server at PREFECT_API_URL does not
    respond.
    """
    set_prefect_env()
    if url := configured_server() or running_server():
        with use_api(url):
            answer = _request_run(url, reason)
        if answer:
            return answer
    outcome = run_once(reason)
    if outcome.ending == "failed":
        raise StageError(outcome.message)
    return f"{outcome.ending}: {outcome.message}"


def run_once(because: str, drop: Path | None = None, tracebacks: bool = False) -> Outcome:
    """Run the flow in this process and return its outcome; starts a temporary Prefect server if none runs.

    tracebacks: whether Prefect's log shows tracebacks; the outcome's message has the cause. Raises StageError if
    Prefect's server cannot be started, or the server at PREFECT_API_URL does not respond.
    """
    with ensure_server():
        import httpx
        from prefect.logging.handlers import APILogHandler

        from pipeline.flows.retraining import retrain

        if not tracebacks:
            _hide_tracebacks()
        try:
            state = retrain(because, drop and str(drop), return_state=True)
        except httpx.HTTPError as error:
            # The server did not accept the final state; the run itself may have finished and written its record.
            last = read_run("last")
            if last is None or last.process != os.getpid() or last.outcome is None:
                raise StageError(f"Prefect's server does not respond: {error}") from error
            return last.outcome
        APILogHandler().flush()  # before a temporary server stops
        if state.is_cancelled():
            return Outcome("busy", state.message or "another retraining is in progress")
        last = read_run("last")
        if state.name == "Skipped" or last is None or last.outcome is None or last.process != os.getpid():
            return Outcome("failed" if state.is_failed() or state.is_crashed() else "skipped", state.message or "")
        return last.outcome


def _request_run(url: str, reason: str) -> str | None:
    """Request a run of the deployment; None if the server has no such deployment. Raises PrefectServerError."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.exceptions import ObjectNotFound

    try:
        with get_client(sync_client=True) as client:
            deployment = client.read_deployment_by_name(DEPLOYMENT)
            states = {"type": {"any_": ["SCHEDULED", "PENDING"]}}
            pending = FlowRunFilter.model_validate({"deployment_id": {"any_": [deployment.id]}, "state": states})
            if any(not run.auto_scheduled for run in client.read_flow_runs(flow_run_filter=pending)):
                return "a retraining is already requested and has not started"
            run = client.create_flow_run_from_deployment(deployment.id, parameters={"because": reason})
    except ObjectNotFound:
        return None
    except httpx.HTTPError as error:
        cause = " ".join(str(error).split())
        raise PrefectServerError(
            f"Prefect's server at {without_password(url)} rejected the request for a retraining: {cause}"
        ) from error
    return f"requested a retraining from the schedule, run {run.name!r}"


def _remove_traceback(record: logging.LogRecord) -> bool:
    """Logging filter that removes the traceback from a record and keeps its message."""
    record.exc_info = record.exc_text = None
    return True


def _hide_tracebacks() -> None:
    loggers: list[Any] = [logging.getLogger(name) for name in ("prefect", "prefect.flow_runs", "prefect.task_runs")]
    for handler in {handler for logger in loggers for handler in logger.handlers}:
        handler.addFilter(_remove_traceback)

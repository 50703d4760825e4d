"""`tailor schedule`: run Prefect's server and a runner of the flow until SIGTERM, and restart them on failure.

The schedule is stored in the server's database and survives a restart. Of the runs missed meanwhile, the newest is run;
the others are cancelled with a reason.
"""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import psutil

from pipeline.params import load_params
from pipeline.scheduling.prefect_server import (
    HOME,
    PrefectServer,
    PrefectServerError,
    configured_server,
    is_healthy,
    running_server,
    set_prefect_env,
    use_api,
)
from pipeline.scheduling.trigger import DEPLOYMENT, NAME
from pipeline.shared import owned_process
from pipeline.shared.errors import ParamsError
from serving.shared.terminal import counted

CHECK_INTERVAL = 1.0  # seconds between checks of the server's process
KILL_AFTER = 15.0  # seconds between SIGTERM and SIGKILL of a run
RETRY_INTERVAL = 5.0  # seconds between attempts to reach or restart a lost server
OWNER_SCRIPT = Path(owned_process.__file__).name  # in the command line of the server's owner process


def run_schedule(cron: str, timezone: str | None, log: Callable[[str], None], port: int = 0, home: Path = HOME) -> None:
    """Serve the flow on a schedule until SIGTERM or Ctrl-C; starts a Prefect server unless PREFECT_API_URL is set.

    cron: five fields. timezone: an IANA name; UTC if None. Raises ParamsError if cron, timezone or params.yaml is not
    valid, before a process is started; PrefectServerError if the project's schedule runs already, or the server does
    not start or does not respond.
    """
    set_prefect_env(home)
    load_params()
    url = configured_server()
    _check_schedule(cron, timezone)
    with contextlib.ExitStack() as stack:
        if url is None:
            if running := running_server(home):
                raise PrefectServerError(f"a schedule already runs for this project, at {running}; stop it first")
            server = stack.enter_context(PrefectServer(home, port))
            url = server.api_url
            stack.enter_context(use_api(url))
            ended = threading.Event()
            stack.callback(ended.set)
            threading.Thread(target=_restart_server, args=(server, ended, log), daemon=True).start()
            log(f"Prefect's server runs at {server.ui_url}")
        stack.callback(end_runs)
        _serve(cron, timezone or "UTC", log, url)


def _serve(cron: str, timezone: str, log: Callable[[str], None], url: str) -> None:
    """Run Prefect's runner, and restart it after it lost the server."""
    import httpx
    from prefect.schedules import Cron

    # Prefect's SIGTERM handler does not await a coroutine that it calls.
    warnings.filterwarnings("ignore", message="coroutine 'Runner.astop' was never awaited")
    from pipeline.flows.retraining import retrain

    while True:
        started = time.monotonic()
        try:
            missed_times = cancel_missed_runs()
            if missed_times:
                log(
                    f"{counted(len(missed_times), 'run', 'were')} missed; the run of {missed_times[-1]:%F %T} UTC starts now"
                )
            log(f"retrains at {cron!r} ({timezone}) until it is stopped")
            retrain.serve(
                name=NAME,
                schedule=Cron(cron, timezone=timezone),
                parameters={"because": "the schedule"},
                limit=1,
                pause_on_shutdown=False,
                print_starting_message=False,
            )
            return
        except (RuntimeError, httpx.HTTPError) as error:  # one or several polls failed
            if is_healthy(url) and time.monotonic() - started < RETRY_INTERVAL:
                raise PrefectServerError(f"Prefect's runner ended: {error}") from error
            log("the runner lost the connection to Prefect's server and waits for it")
            while not is_healthy(url):
                time.sleep(RETRY_INTERVAL)


def cancel_missed_runs() -> list[datetime]:
    """Cancel the missed runs except the newest. Returns the scheduled times of all missed runs, in order."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Cancelled

    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound:
            return []
        flow_run_filter = {
            "deployment_id": {"any_": [deployment.id]},
            "state": {"type": {"any_": ["SCHEDULED"]}},
            "expected_start_time": {"before_": datetime.now(UTC)},
        }
        late_runs = client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate(flow_run_filter), sort=FlowRunSort.EXPECTED_START_TIME_ASC
        )
        missed_runs = [run for run in late_runs if run.auto_scheduled]
        for run in missed_runs[:-1]:
            reason = f"missed; replaced by the run of {missed_runs[-1].expected_start_time}"
            client.set_flow_run_state(run.id, Cancelled(message=reason), force=True)
    return [run.expected_start_time for run in missed_runs]


def end_runs() -> None:
    """End the runs that the runner started; the runner does not end them on SIGTERM."""
    runs = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            # The server ends later, with its owner process. Compare file names: a path may contain the same text.
            if not any(Path(word).name == OWNER_SCRIPT for word in child.cmdline()):
                child.terminate()
                runs.append(child)
    for run in psutil.wait_procs(runs, timeout=KILL_AFTER)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            run.kill()


def _restart_server(server: PrefectServer, ended: threading.Event, log: Callable[[str], None]) -> None:
    """Restart the server each time it has exited."""
    while not ended.wait(CHECK_INTERVAL):
        if not server.is_running():
            log("Prefect's server exited unexpectedly and is restarted")
            try:
                server.start()
            except PrefectServerError as error:
                log(str(error))
                ended.wait(RETRY_INTERVAL)


def _check_schedule(cron: str, timezone: str | None) -> None:
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    try:
        ZoneInfo(timezone or "UTC")
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ParamsError(f"--timezone is {timezone!r}; expected an IANA name such as Europe/London") from None
    try:
        CronSchedule(cron=cron)
    except ValidationError:
        raise ParamsError(
            f"--cron is {cron!r}; expected five fields: minute, hour, day, month, weekday, as in '0 3 * * *'"
        ) from None

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
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import psutil

from pipeline.params import load_params
from pipeline.scheduling.prefect_server import (
    HOME,
    PrefectServer,
    PrefectServerError,
    answers,
    given_server,
    running_server,
    settle_environment,
    talking_to,
)
from pipeline.scheduling.trigger import DEPLOYMENT, NAME
from pipeline.shared import owned_process
from pipeline.shared.errors import ParamsError
from serving.shared.terminal import counted

LOOK_EVERY = 1.0  # seconds
PATIENCE = 15.0  # seconds between SIGTERM and SIGKILL of a run
PAUSE = 5.0  # seconds between attempts to reach or restart a lost server
BECAUSE = "the schedule"
LEASH = Path(owned_process.__file__).name


def keep_schedule(
    cron: str, timezone: str | None, say: Callable[[str], None], port: int = 0, home: Path = HOME
) -> None:
    """Serve the flow on a schedule until SIGTERM or Ctrl-C; starts a Prefect server unless PREFECT_API_URL is set.

    cron: five fields. timezone: an IANA name; UTC if None. Raises ParamsError if cron, timezone or params.yaml is not
    valid, before a process is started; PrefectServerError if the project's schedule runs already, or the server does
    not start or does not respond.
    """
    settle_environment(home)
    load_params()
    url = given_server()
    _check(cron, timezone)
    with ExitStack() as stack:
        if url is None:
            if running := running_server(home):
                raise PrefectServerError(f"a schedule runs for this project already, at {running}; stop it first")
            server = stack.enter_context(PrefectServer(home, port))
            url = server.api_url
            stack.enter_context(talking_to(url))
            ended = threading.Event()
            stack.callback(ended.set)
            threading.Thread(target=_keep_up, args=(server, ended, say), daemon=True).start()
            say(f"Prefect's server runs at {server.ui_url}")
        stack.callback(_end_runs)
        _serve(cron, timezone, say, url)


def _serve(cron: str, timezone: str | None, say: Callable[[str], None], url: str) -> None:
    """Run Prefect's runner, and restart it after it lost the server."""
    import httpx
    from prefect.schedules import Cron

    # Prefect's SIGTERM handler does not await a coroutine that it calls.
    warnings.filterwarnings("ignore", message="coroutine 'Runner.astop' was never awaited")
    from pipeline.flows.retraining import retrain

    while True:
        begun = time.monotonic()
        try:
            caught_up = cancel_all_missed_but_one()
            if caught_up:
                say(
                    f"{counted(caught_up[0], 'run', 'were')} missed; the one of {caught_up[1]:%F %T} UTC is caught up now"
                )
            say(f"retrains at {cron!r} ({timezone or 'UTC'}) until it is stopped")
            retrain.serve(
                name=NAME,
                schedule=Cron(cron, timezone=timezone or "UTC"),
                parameters={"because": BECAUSE},
                limit=1,
                pause_on_shutdown=False,
                print_starting_message=False,
            )
            return
        except (RuntimeError, httpx.HTTPError) as error:  # one or several polls failed
            if answers(url) and time.monotonic() - begun < PAUSE:
                raise PrefectServerError(f"Prefect's runner ended: {error}") from error
            say("the runner lost Prefect's server and waits for it")
            while not answers(url):
                time.sleep(PAUSE)


def cancel_all_missed_but_one() -> tuple[int, datetime] | None:
    """Cancel missed runs except the newest. Returns the number missed and the time of the newest; None without any."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.exceptions import ObjectNotFound
    from prefect.states import Cancelled

    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(DEPLOYMENT)
        except ObjectNotFound:
            return None
        wanted = {
            "deployment_id": {"any_": [deployment.id]},
            "state": {"type": {"any_": ["SCHEDULED"]}},
            "expected_start_time": {"before_": datetime.now(UTC)},
        }
        found = client.read_flow_runs(
            flow_run_filter=FlowRunFilter.model_validate(wanted), sort=FlowRunSort.EXPECTED_START_TIME_ASC
        )
        late = [run for run in found if run.auto_scheduled]
        for run in late[:-1]:
            reason = f"missed; caught up once, by the run of {late[-1].expected_start_time}"
            client.set_flow_run_state(run.id, Cancelled(message=reason), force=True)
    return (len(late), late[-1].expected_start_time) if late else None


def _end_runs() -> None:
    """End the runs that the runner started; the runner does not end them on SIGTERM."""
    runs = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            # The server ends later, with its owner process. Compare file names: a path may contain the same text.
            if not any(Path(word).name == LEASH for word in child.cmdline()):
                child.terminate()
                runs.append(child)
    for run in psutil.wait_procs(runs, timeout=PATIENCE)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            run.kill()


def _keep_up(server: PrefectServer, ended: threading.Event, say: Callable[[str], None]) -> None:
    """Restart the server each time it has exited."""
    while not ended.wait(LOOK_EVERY):
        if not server.alive():
            say("Prefect's server ended by itself and is started again")
            try:
                server.start()
            except PrefectServerError as error:
                say(str(error))
                ended.wait(PAUSE)


def _check(cron: str, timezone: str | None) -> None:
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

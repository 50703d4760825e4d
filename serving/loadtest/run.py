"""Run a load test: Locust in a subprocess, after checks of its input and with a time limit."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving.client.images import image_files, read_image
from serving.client.sync_client import Client
from serving.loadtest.plan import HEADERS_VARIABLE, LoadPlan
from serving.shared.atomic import write_file
from serving.shared.errors import ServingError, install_command
from serving.shared.ports import choose_ports
from serving.shared.process import end_session, start_process, tailor_environment

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
GRACE = 60  # seconds beyond the test in which Locust starts, drains and writes its reports
PATIENCE = 15.0  # seconds between SIGTERM and SIGKILL


def run(plan: LoadPlan, report: Path, progress: Callable[[float], None]) -> dict[str, Any]:
    """Run a load test; return the content of summary.json, with `passed`. Starts no server.

    report: a folder for loadtest.html, loadtest_stats.csv and the other tables of Locust, summary.json and locust.log.
    progress: called with the elapsed fraction of the time. Raises ServingError when Locust is missing or exits early,
    when the server does not respond to a first request, or when the test exceeds its time by more than GRACE seconds.
    """
    if importlib.util.find_spec("locust") is None:
        raise ServingError(f"locust is not installed; {install_command('loadtest')}")
    connection = plan.connection
    with Client(connection.url, plan.timeout, headers=connection.headers, ca_file=connection.ca_file) as client:
        # A wrong URL or prior fails here with one line, and not inside Locust.
        client.predict([read_image(image_files(plan.images)[0])], plan.prior)
    report.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["locust", "-f", "serving/loadtest/locustfile.py", "--headless", *plan.locust_arguments()])
    result = {**_run_locust(plan, report, progress), "command": command}
    write_file(report / "summary.json", json.dumps(result, indent=2) + "\n")
    return result


def _run_locust(plan: LoadPlan, report: Path, progress: Callable[[float], None]) -> dict[str, Any]:
    """Run Locust in a separate session until it exits; return its summary."""
    summary, log = report / ".summary.json", report / "locust.log"
    summary.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"]
    command += [*plan.locust_arguments(), f"--summary={summary.absolute()}", f"--stop-timeout={plan.timeout:g}"]
    command += ["--csv", str(report / "loadtest"), "--csv-full-history", "--html", str(report / "loadtest.html")]
    if plan.workers > 1:
        # By default Locust's master would listen on every address of the machine.
        port = choose_ports("127.0.0.1", {"--master-port": 0})["--master-port"]
        command += [f"--processes={plan.workers}", "--master-bind-host=127.0.0.1", f"--master-bind-port={port}"]
        command += ["--master-host=127.0.0.1", f"--master-port={port}"]
    with log.open("wb") as output:
        process = start_process(command, _environment(plan), Path.cwd(), output=output)
    try:
        began = time.monotonic()
        while process.poll() is None:
            elapsed = time.monotonic() - began
            if elapsed > plan.seconds + plan.timeout + GRACE:
                raise ServingError(f"Locust is still running {elapsed - plan.seconds:.0f} s after its time; see {log}")
            progress(min(1.0, elapsed / plan.seconds))
            time.sleep(0.1)
    finally:
        status = end_session(process, PATIENCE)
    if not summary.is_file():
        raise ServingError(f"Locust exited with status {status} and no result: {_last_line(log)}")
    result = json.loads(summary.read_text(encoding="utf-8"))
    summary.unlink()
    return result


def _environment(plan: LoadPlan) -> dict[str, str]:
    """Return Locust's environment: Tailor's packages and the headers, without LOCUST_ variables of the caller."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
    return tailor_environment(environment) | {HEADERS_VARIABLE: json.dumps(dict(plan.connection.headers))}


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][-500:] if lines else f"{log} is empty"

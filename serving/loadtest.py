"""`tailor loadtest`: Locust with checks before it, a bound around it, and its own cost measured beside the result."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from serving.atomic import write_file
from serving.client import Client
from serving.errors import ServingError
from serving.images import image_files, read_image
from serving.load.plan import HEADERS_VARIABLE, LoadPlan, Thresholds
from serving.ports import choose_ports
from serving.process import end_session, start_process

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
GRACE = 60  # seconds that Locust gets beyond the test, to start, to drain and to write
PATIENCE = 15.0  # seconds that Locust gets to end when it is told to
OVERHEAD_SECONDS = 3
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Overhead:
    """What Locust costs: its rate and a bare client's with the same requests and users, processor ms a request."""

    locust_rps: float
    bare_rps: float
    locust_ms: float
    bare_ms: float


def run(plan: LoadPlan, report: Path, measure_overhead: bool, progress: Progress) -> dict[str, Any]:
    """Run a load test; returns what summary.json holds, with `passed`. Starts no server.

    report: a folder for loadtest.html, loadtest_stats.csv and the other tables of Locust, summary.json and locust.log.
    progress: called with a step's name and the part of it that is done. Raises ServingError when Locust is missing or
    ends by itself, when the server does not answer a first request, or when the test takes far longer than planned.
    """
    if importlib.util.find_spec("locust") is None:
        raise ServingError("locust is not installed; install the extra: pip install 'tailor[loadtest]'")
    _ask_once(plan)
    report.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"command": plan.described()}
    if measure_overhead and not (plan.connection.secure and plan.connection.protocol == "http"):
        found["overhead"] = vars(_overhead(plan, report, progress))
    files = ["--csv", report / "loadtest", "--csv-full-history", "--html", report / "loadtest.html"]
    result = _locust(plan, report, "load test", [str(part) for part in files], progress)
    found = {**result, **found}
    write_file(report / "summary.json", json.dumps(found, indent=2) + "\n")
    return found


def _ask_once(plan: LoadPlan) -> None:
    """One image under the prior that is tried: whether the server is there, and takes both."""
    connection = plan.connection
    with Client(connection.url, plan.timeout, headers=connection.headers, ca_file=connection.ca_file) as client:
        client.predict([read_image(image_files(plan.images)[0])], plan.prior)


def _overhead(plan: LoadPlan, report: Path, progress: Progress) -> Overhead:
    """A short closed test by Locust, and the same by a bare loop, one after the other."""
    short = replace(
        plan, seconds=OVERHEAD_SECONDS, rate=None, shape="constant", workers=1, thresholds=Thresholds(failures=1.0)
    )
    by_locust = _locust(short, report, "overhead of Locust", [], progress)
    given = {"--host": plan.connection.url, "--images": plan.images, "--prior": plan.prior, "--batch": plan.batch}
    given |= {"--adjusted-share": plan.adjusted_share, "--users": plan.users, "--seconds": OVERHEAD_SECONDS}
    if plan.connection.ca_file:
        given["--ca-file"] = plan.connection.ca_file
    progress("bare client", 0.0)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "serving.load.bare", *(f"{name}={value}" for name, value in given.items())],
        env=_environment(plan),
        capture_output=True,
        text=True,
        timeout=OVERHEAD_SECONDS + GRACE,
        check=False,
    )
    progress("bare client", 1.0)
    if done.returncode != 0:
        raise ServingError(f"the bare client failed: {done.stderr.strip()[-500:]}")
    bare = json.loads(done.stdout)
    requests = max(1, by_locust["total"]["requests"])
    return Overhead(
        locust_rps=by_locust["total"]["rps"],
        bare_rps=bare["requests"] / bare["seconds"],
        locust_ms=1000 * by_locust["processor_seconds"] / requests,
        bare_ms=1000 * bare["processor_seconds"] / max(1, bare["requests"]),
    )


def _locust(plan: LoadPlan, report: Path, step: str, extra: list[str], progress: Progress) -> dict[str, Any]:
    """Run Locust to its end, in a session of its own; its summary."""
    summary, log = report / ".summary.json", report / "locust.log"
    summary.unlink(missing_ok=True)
    command = [sys.executable, "-P", "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary"]
    command += [*plan.locust_arguments(), f"--summary={summary.absolute()}", f"--stop-timeout={plan.timeout:g}", *extra]
    if plan.workers > 1:
        # Locust's master would listen on every address of the machine.
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
                raise ServingError(f"Locust has not ended {elapsed - plan.seconds:.0f} s after its time; see {log}")
            progress(step, min(1.0, elapsed / plan.seconds))
            time.sleep(0.1)
    finally:
        status = end_session(process, PATIENCE)
    if not summary.is_file():
        raise ServingError(f"Locust ended with status {status} and no result: {_last_line(log)}")
    progress(step, 1.0)
    found = json.loads(summary.read_text(encoding="utf-8"))
    summary.unlink()
    return found


def _environment(plan: LoadPlan) -> dict[str, str]:
    """Ours for the processes that send: our packages, the headers, and no settings of Locust from elsewhere."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
    paths = [str(LOCUSTFILE.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    environment[HEADERS_VARIABLE] = json.dumps(dict(plan.connection.headers))
    return environment


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][-500:] if lines else f"{log} is empty"

"""Recovery time after Triton is killed: `python -m benchmarks.recovery [--kills 5] [--rate 40]`.

Serves an export with `tailor serve`, sends requests to its classifier at a steady rate over HTTP without retries, and
repeatedly kills Triton with SIGKILL. Recovery time: from the kill to the scheduled start of the last failed request.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.other_work import processor
from benchmarks.swaps import golden_images, send_at_rate
from serving.repository.writer import write_repository
from serving.transport.retries import Retries

GOAL = 4.0  # seconds
SETTLING = 8.0  # seconds before a kill; above SupervisionLimits.served, so that each start counts as successful
LONGEST = 30.0  # seconds after a kill in which failures are attributed to it
PORTS = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")


def measure(export: Path, kills: int, rate: float, folder: Path) -> tuple[list[float], list[tuple[float, float, int]]]:
    """Return the times of the kills, and every request: (due time, latency, version or 0). Seconds, monotonic clock."""
    root = write_repository(export, folder / "repository")
    command = [sys.executable, "-m", "serving.commands", "serve", "--repository", str(root), *PORTS, "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as serving:
        assert serving.stdout is not None
        url = serving.stdout.readline().split()[1]
        load = [sys.executable, "-m", "benchmarks.recovery", "--send", url]
        load += ["--export", str(export), "--rate", str(rate)]
        caller = subprocess.Popen(
            load, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        moments = []
        try:
            for _ in range(kills):
                time.sleep(SETTLING)
                family = psutil.Process(serving.pid).children(recursive=True)
                triton = next(process for process in family if process.name() == "tritonserver")
                moments.append(time.monotonic())
                triton.kill()
                while serving.stdout and not _restarted(serving.pid, triton.pid):
                    time.sleep(0.1)
            time.sleep(SETTLING)
            output, _ = caller.communicate()
        finally:
            caller.kill()
            serving.terminate()
            serving.stdout.read()
    return moments, [tuple(row) for row in json.loads(output)]


def _restarted(owner: int, killed: int) -> bool:
    names = [(process.pid, process.name()) for process in psutil.Process(owner).children()]
    return any(name == "tritonserver" and process != killed for process, name in names)


def report(command: str, moments: list[float], requests: list[tuple[float, float, int]]) -> tuple[str, bool]:
    """Return a text with the figures, and whether the median recovery time meets the goal."""
    failed = [due for due, _, version in requests if version == 0]
    ends = [*moments[1:], moments[-1] + LONGEST]
    recoveries = [
        max([due - kill for due in failed if kill <= due < end], default=0.0)
        for kill, end in zip(moments, ends, strict=True)
    ]
    median = statistics.median(recoveries)
    lines = [
        f"`{command}`",
        "",
        f"{processor()}; load average at the end {os.getloadavg()[0]:.2f}.",
        f"{len(requests)} requests, {len(failed)} failed, {len(moments)} kills; seconds until the last failed request: "
        f"{', '.join(f'{seconds:.1f}' for seconds in recoveries)}; median {median:.1f} (goal ≤ {GOAL:g}).",
    ]
    return "\n".join(lines), median <= GOAL


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recovery", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--export", type=Path, default=Path("artifacts/export"), help="default: %(default)s")
    parser.add_argument("--kills", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--rate", type=float, default=40.0, help="requests/s, default: %(default)s")
    parser.add_argument("--send", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.send:
        retries = Retries(attempts=1)
        return send_at_rate(options.send, golden_images(options.export), options.rate, retries=retries)
    with tempfile.TemporaryDirectory(prefix="tailor-recovery-") as folder:
        measured = measure(options.export.absolute(), options.kills, options.rate, Path(folder))
    text, met = report(f"python -m benchmarks.recovery --kills {options.kills} --rate {options.rate:g}", *measured)
    print(text)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())

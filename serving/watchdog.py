"""`python -m serving.watchdog PREFIX`: a small process that outlives a killed owner and cleans up after it.

It waits on its standard input, a pipe that its owner alone holds open, and so learns of the owner's end whatever its
cause. The owner dismisses it with one byte after a clean stop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import psutil

from serving.leftovers import processes_of, sweep

PATIENCE = 10.0  # seconds that a server without its owner gets to answer what it has begun
DISMISSED = b"."


def start_watchdog(prefix: str) -> subprocess.Popen[bytes]:
    """Start the watchdog of a run; it holds no file of ours open but its pipe."""
    package = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "serving.watchdog", prefix],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the owner
    )


def dismiss(watchdog: subprocess.Popen[bytes]) -> None:
    """Tell the watchdog that nothing is left to clean up, and wait for its end."""
    # Closed where a signal has cut an earlier call short, after it had told the watchdog.
    if watchdog.stdin and not watchdog.stdin.closed:
        with contextlib.suppress(BrokenPipeError):  # it has been killed itself
            watchdog.communicate(DISMISSED)
    watchdog.wait()


def end_servers(processes: Iterable[psutil.Process]) -> None:
    """Ask those that are a Triton server to end; one that goes by itself just now is let go."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.name() == "tritonserver":
                process.terminate()


def main(prefix: str) -> int:
    """Wait for the owner's end; unless it dismissed us, end its server and remove what is left."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a whole process group may be told to end; we go last
    if os.read(0, 1) == DISMISSED:
        return 0
    end_servers(processes_of(prefix))
    sweep(prefix, PATIENCE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

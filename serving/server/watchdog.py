"""`python -m serving.server.watchdog PREFIX`: ends a Triton server, and removes its files, when its owner was killed.

It reads its standard input, a pipe that only the owner holds open, and so detects the owner's end of any cause. After a
clean stop the owner dismisses it with one byte.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable

import psutil

from serving.server.leftovers import processes_of, sweep
from serving.shared.process import with_tailor

PATIENCE = 10.0  # seconds between SIGTERM and SIGKILL, for running requests
DISMISSED = b"."


def start_watchdog(prefix: str) -> subprocess.Popen[bytes]:
    """Start the watchdog of a run; of the owner's files it holds only its pipe open."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "serving.server.watchdog", prefix],
        env=with_tailor(os.environ),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the owner
    )


def dismiss(watchdog: subprocess.Popen[bytes]) -> None:
    """End the watchdog where nothing is left to remove, and wait for its exit."""
    # Closed where a signal interrupted an earlier call after the byte was sent.
    if watchdog.stdin and not watchdog.stdin.closed:
        with contextlib.suppress(BrokenPipeError):  # it has been killed itself
            watchdog.communicate(DISMISSED)
    watchdog.wait()


def end_servers(processes: Iterable[psutil.Process]) -> None:
    """Send SIGTERM to each process that is a Triton server; one that has just exited is ignored."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.name() == "tritonserver":
                process.terminate()


def main(prefix: str) -> int:
    """Wait for the owner's end; unless it dismissed the watchdog, end its server and remove its files."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # also sent to a whole process group, of which this process ends last
    if os.read(0, 1) == DISMISSED:
        return 0
    end_servers(processes_of(prefix))
    sweep(prefix, PATIENCE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""Watchdog process of a Triton server: ends the server and removes its files when its owner was killed.

`python -m serving.server.watchdog PREFIX` reads its standard input, a pipe that only the owner holds open. The pipe
closes when the owner exits for any reason. After a clean stop the owner sends one byte, and the watchdog exits.
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
from serving.shared.process import tailor_environment

PATIENCE = 10.0  # seconds between SIGTERM and SIGKILL, for running requests
DISMISSED = b"."


def start_watchdog(prefix: str) -> subprocess.Popen[bytes]:
    """Start the watchdog of a run; it inherits no open file of the owner except the pipe."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "serving.server.watchdog", prefix],
        env=tailor_environment(os.environ),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that Ctrl-C reaches only the owner
    )


def dismiss(watchdog: subprocess.Popen[bytes]) -> None:
    """Stop the watchdog after a clean stop of the server, and wait for its exit."""
    # The pipe is closed already if a signal interrupted an earlier call after the byte was sent.
    if watchdog.stdin and not watchdog.stdin.closed:
        with contextlib.suppress(BrokenPipeError):  # the watchdog was killed
            watchdog.communicate(DISMISSED)
    watchdog.wait()


def end_servers(processes: Iterable[psutil.Process]) -> None:
    """Send SIGTERM to each process named `tritonserver`; one that has exited is ignored."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.name() == "tritonserver":
                process.terminate()


def main(prefix: str) -> int:
    """Wait until the owner exits or dismisses the watchdog; in the first case end its server and remove its files."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # A signal to a whole process group reaches this process too, which must exit last.
        signal.signal(number, signal.SIG_IGN)
    if os.read(0, 1) == DISMISSED:
        return 0
    end_servers(processes_of(prefix))
    sweep(prefix, PATIENCE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

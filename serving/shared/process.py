"""Start and end child processes, each in a new session, together with the processes that they started.

Why a session: Ctrl-C on the terminal then reaches only the parent, which stops its children in order, and one signal to
the session's process group ends what a killed child left behind.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from serving.shared.errors import ServingError
from serving.shared.priority import lower_priority

POLL = 0.05  # seconds
# Triton has about 70 files open with two models on two cores, and one for each connection; at 64 it crashes at its
# start.
OPEN_FILES = 512


def check_open_files() -> None:
    """Raise ServingError if the limit of open files, which child processes inherit, is too small for Triton."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= limit < OPEN_FILES:  # RLIM_INFINITY is negative
        raise ServingError(
            f"the limit of open files (ulimit -n) is {limit}; Triton needs at least {OPEN_FILES}; "
            f"raise it: ulimit -n {2 * OPEN_FILES}, or LimitNOFILE= of a systemd unit"
        )


def tailor_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with Tailor's packages on PYTHONPATH, for a child process that imports them."""
    paths = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def wait_for(process: subprocess.Popen[bytes] | None, timeout: float | None) -> int | None:
    """Wait for a process; its exit status, or None if it still runs after `timeout` seconds or `process` is None."""
    try:
        return process.wait(timeout) if process else None
    except subprocess.TimeoutExpired:
        return None


def start_process(
    command: Sequence[str],
    environment: dict[str, str],
    folder: Path,
    niceness: int = 0,
    output: IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process in its own session.

    niceness: of the process, 0 to 19; 0 keeps the caller's. output: a file for stdout and stderr; None makes a pipe,
    which the caller must read.
    """
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if output is None else output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    if niceness:
        lower_priority(process.pid, niceness)
    return process


def end_process(process: subprocess.Popen[bytes], timeout: float) -> int:
    """Send SIGTERM, and SIGKILL after `timeout` seconds (only SIGKILL if it is 0); returns the exit status."""
    if process.poll() is None:
        if timeout:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def end_session(process: subprocess.Popen[bytes], timeout: float) -> int:
    """`end_process`, then SIGKILL for the remaining processes of its process group; returns the exit status."""
    status = end_process(process, timeout)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return status

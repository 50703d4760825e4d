"""Child processes: started in a session of their own, ended in order, and with all that they started."""

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
from serving.shared.priority import stand_back

POLL = 0.05  # seconds
# Triton holds about 70 with two models on two cores, and one for each connection; at 64 it crashes while it starts.
OPEN_FILES = 512


def check_open_files() -> None:
    """Raise ServingError where the limit of open files, which child processes inherit, is too small for Triton."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= limit < OPEN_FILES:  # RLIM_INFINITY is negative
        raise ServingError(
            f"the limit of open files (ulimit -n) is {limit}; Triton needs at least {OPEN_FILES}; "
            f"raise it: ulimit -n {2 * OPEN_FILES}, or LimitNOFILE= of a systemd unit"
        )


def with_tailor(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment with Tailor's packages on PYTHONPATH, for a child process that imports them."""
    paths = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH")]
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def wait_for(process: subprocess.Popen[bytes] | None, timeout: float | None) -> int | None:
    """The exit status of a process, or None when it still runs after `timeout` seconds, or there is none."""
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
    """Start a process in its own session, so that Ctrl-C reaches only this process.

    niceness: added to its priority, 0 to 19. output: a file for its output; None is a pipe, which must be read.
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
        stand_back(process.pid, niceness)
    return process


def end_process(process: subprocess.Popen[bytes], patience: float) -> int:
    """Send SIGTERM, and SIGKILL after `patience` seconds (at once where that is 0); the exit status."""
    if process.poll() is None:
        if patience:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def end_session(process: subprocess.Popen[bytes], patience: float) -> int:
    """`end_process`, then kill what it left behind in its session; its exit status."""
    status = end_process(process, patience)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return status

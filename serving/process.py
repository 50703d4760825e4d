"""The server's process: in a session of its own, told to end in order, and never outlived by what it started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from serving.priority import stand_back

POLL = 0.05  # seconds


def start_process(
    command: Sequence[str],
    environment: dict[str, str],
    folder: Path,
    niceness: int = 0,
    output: IO[bytes] | None = None,
) -> subprocess.Popen[bytes]:
    """Start a process in its own session, so that Ctrl-C reaches only us.

    niceness: how far it stands back for others, 0 to 19. output: a file for what it prints; None is a pipe, to be read.
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
    """Ask a process to end, kill it after `patience` seconds (at once where that is 0); its exit status."""
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

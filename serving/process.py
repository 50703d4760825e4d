"""The server's process: in a session of its own, ended with us, and never outlived by what it started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from serving.errors import InputError

PR_SET_PDEATHSIG = 1
POLL = 0.05  # seconds
GONE_WITHIN = 5.0  # seconds that killed processes get to disappear


def start_process(command: Sequence[str], environment: dict[str, str], folder: Path, log: Path) -> subprocess.Popen:
    """Start a process in its own session, its output in the file `log`. Raises InputError when log cannot be written.

    In its own session Ctrl-C reaches only us, who then stop it in order.
    """
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        output = log.open("wb")
    except OSError as error:
        raise InputError(f"{log}: {error.strerror}; give a log file that can be written") from None
    with output:
        return subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent(),
        )


def end_process(process: subprocess.Popen, patience: float) -> int:
    """Ask a process to end, kill it after `patience` seconds, then kill what it left behind; its exit status."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
    _kill_session(process.pid)  # stubs outlive a server that was killed or that lost one of them
    return process.wait()


def _end_with_parent() -> Callable[[], object] | None:
    """What the child runs before its program: ask the kernel to end it when this process is killed.

    The kernel ties this to the thread that starts the child, so it is only asked for in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _kill_session(session: int) -> None:
    """Kill what is left of a session and wait until it is gone."""
    deadline = time.monotonic() + GONE_WITHIN
    while (left := _members(session)) and time.monotonic() < deadline:
        for member in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        time.sleep(POLL)


def _members(session: int) -> list[psutil.Process]:
    """The live processes of a session, without zombies: where process 1 does not collect those they stay for ever."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members

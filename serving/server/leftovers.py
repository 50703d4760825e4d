"""Find and remove what a killed server or owner left: processes, shared memory (/dev/shm) and the runtime folder.

The owner is the process that runs the server. Every resource of one run has the run's prefix: the names of its files in
/dev/shm and of its runtime folder, and the command lines of the server and its inference processes. The prefix contains
the owner's PID namespace, process id and start time. So a run whose owner has exited is detected without a pid file,
which could be stale.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from serving.server.installation import STUB_NAME

SHARED_MEMORY = Path("/dev/shm")
NAME = re.compile(r"tailor_(\d+)_(\d+)_(\d+)_[0-9a-f]{8}_")
POLL = 0.05  # seconds
EXIT_TIMEOUT = 5.0  # seconds to wait for killed processes to exit


def new_prefix() -> str:
    """A new unique prefix for a run that this process owns."""
    return f"tailor_{_namespace()}_{os.getpid()}_{_started(os.getpid())}_{secrets.token_hex(4)}_"


def runtime_folder(prefix: str) -> Path:
    """Create the runtime folder of a run: empty, readable only by this user, its name starts with the prefix.

    It is in /tmp if the path of the usual folder for temporary files has characters that a shell interprets, because
    Triton does not quote the command line of an inference process.
    """
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent if re.fullmatch(r"[A-Za-z0-9._/+-]+", parent) else "/tmp"))


def runtime_folders(prefix: str) -> list[Path]:
    """The runtime folders of a run; empty if the folder was removed or is in another folder for temporary files."""
    return [path for path in _temporary(prefix) if path.is_dir()]


def sweep(prefix: str, patience: float = 0.0) -> None:
    """Remove everything of a run; its processes are killed if they have not exited after `patience` seconds.

    A child that the owner had just started shows the owner's command line, without the prefix, until it calls exec. So
    the run counts as ended only after two checks in a row find no process.
    """
    deadline, empty = time.monotonic() + patience, 0
    kill_until = deadline + EXIT_TIMEOUT
    while empty < 2 and time.monotonic() < kill_until:
        remaining = list(processes_of(prefix))
        empty = 0 if remaining else empty + 1
        if time.monotonic() >= deadline:
            for process in remaining:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    process.kill()
        time.sleep(POLL)
    for path in (*SHARED_MEMORY.glob(f"{prefix}*"), *_temporary(prefix)):
        with contextlib.suppress(PermissionError):  # of another user; that user's next server start removes it
            _remove(path)


def sweep_dead_runs() -> list[str]:
    """`sweep` every run of this machine whose owner has exited; returns their prefixes."""
    named = {path.name for path in (*SHARED_MEMORY.glob("tailor_*"), *_temporary("tailor_"))}
    prefixes = {match[0] for name in named if (match := NAME.match(name))}
    dead = sorted(prefix for prefix in prefixes if not owner_exists(prefix))
    for prefix in dead:
        sweep(prefix)
    return dead


def processes_of(prefix: str) -> Iterator[psutil.Process]:
    """The running processes with the prefix in their command lines: the server and its inference processes.

    The watchdog's command line has the prefix too; it is left out.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            command = process.cmdline()  # empty for a zombie process
            if (
                process.pid != os.getpid()
                and "serving.server.watchdog" not in command
                and any(prefix in argument for argument in command)
            ):
                yield process


def inference_processes(prefix: str) -> list[tuple[psutil.Process, str, int]]:
    """The running inference processes (Triton's stubs) of a run, each with its model and version."""
    processes = []
    for process in processes_of(prefix):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = process.cmdline()
            if len(command) > 1 and command[0].endswith(STUB_NAME):
                model, version = Path(command[1]).parts[-3:-1]
                processes.append((process, model, int(version)))
    return processes


def is_stopped(process: psutil.Process) -> bool:
    """Whether a process is stopped by a signal (SIGSTOP); a process that has exited is not."""
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _temporary(prefix: str) -> Iterator[Path]:
    for parent in {tempfile.gettempdir(), "/tmp"}:
        yield from Path(parent).glob(f"{prefix}*")


def owner_exists(prefix: str) -> bool:
    """Whether the run's owner exists; also True in another PID namespace, whose processes are not visible from here."""
    namespace, owner, started = map(int, NAME.fullmatch(prefix).groups())
    return namespace != _namespace() or _started(owner) == started


def _remove(path: Path) -> None:
    """Remove a file or folder; retries when another process removes parts of it at the same time."""
    while path.exists() or path.is_symlink():
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        except FileNotFoundError:
            continue


def _namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def _started(process_id: int) -> int | None:
    """Start time of a process in clock ticks since boot; None if it does not exist or is a zombie."""
    try:
        # Split behind the second field, the program's name in brackets, which may contain spaces and brackets.
        fields = (
            Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])

"""What a server leaves when it, or whoever runs it, is killed: processes, shared memory, a runtime folder; and their end.

Everything of one run carries its prefix: the names of its files in /dev/shm, and the command lines of the server and
its stubs. The prefix names the process that runs the server by PID namespace, id and start time, so that a run whose
owner has gone is told from one that lives, without a record that could be lost or lie.
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
GONE_WITHIN = 5.0  # seconds that killed processes get to disappear


def new_prefix() -> str:
    """A prefix for a run of this process, never used before."""
    return f"tailor_{_namespace()}_{os.getpid()}_{_started(os.getpid())}_{secrets.token_hex(4)}_"


def runtime_folder(prefix: str) -> Path:
    """An empty folder for a run, readable by its owner alone; its name starts with the prefix.

    Triton builds the stub's command line without quoting, so where the usual place for temporary files holds anything
    that a shell reads otherwise, it is in /tmp.
    """
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent if re.fullmatch(r"[A-Za-z0-9._/+-]+", parent) else "/tmp"))


def runtime_folders(prefix: str) -> list[Path]:
    """The runtime folder of a run, for whoever may read it; none where it has gone or lies out of sight."""
    return [path for path in _temporary(prefix) if path.is_dir()]


def sweep(prefix: str, patience: float = 0.0) -> None:
    """Remove everything of a run: its processes are killed if they have not gone within `patience` seconds.

    A child that the killed owner had just started may show the owner's command line for a moment, so that no process
    counts as none only when it is seen twice.
    """
    deadline, empty = time.monotonic() + patience, 0
    kill_until = deadline + GONE_WITHIN
    while empty < 2 and time.monotonic() < kill_until:
        left = list(processes_of(prefix))
        empty = 0 if left else empty + 1
        if time.monotonic() >= deadline:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    process.kill()
        time.sleep(POLL)
    for path in (*SHARED_MEMORY.glob(f"{prefix}*"), *_temporary(prefix)):
        with contextlib.suppress(PermissionError):  # another user's, whose own janitor it waits for
            _remove(path)


def sweep_dead_runs() -> list[str]:
    """Sweep every run of this machine whose owner has gone; their prefixes."""
    named = {path.name for path in (*SHARED_MEMORY.glob("tailor_*"), *_temporary("tailor_"))}
    prefixes = {found[0] for name in named if (found := NAME.match(name))}
    dead = sorted(prefix for prefix in prefixes if not owner_lives(prefix))
    for prefix in dead:
        sweep(prefix)
    return dead


def processes_of(prefix: str) -> Iterator[psutil.Process]:
    """The live processes of a run: the server and its stubs, which have the prefix in their command lines.

    The watchdog has it too, and is none of them.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            command = process.cmdline()  # empty for a zombie
            if (
                process.pid != os.getpid()
                and "serving.server.watchdog" not in command
                and any(prefix in a for a in command)
            ):
                yield process


def stubs_of(prefix: str) -> list[tuple[psutil.Process, str, int]]:
    """The live stub processes of a run, each with the model and version that it runs."""
    found = []
    for process in processes_of(prefix):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = process.cmdline()
            if len(command) > 1 and command[0].endswith(STUB_NAME):
                model, version = Path(command[1]).parts[-3:-1]
                found.append((process, model, int(version)))
    return found


def is_stopped(process: psutil.Process) -> bool:
    """Whether a process is stopped by a signal (SIGSTOP); a process that has exited is not."""
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.NoSuchProcess:
        return False


def _temporary(prefix: str) -> Iterator[Path]:
    for parent in {tempfile.gettempdir(), "/tmp"}:
        yield from Path(parent).glob(f"{prefix}*")


def owner_lives(prefix: str) -> bool:
    """Whether the run's owner is there, or in another PID namespace and so not for us to judge."""
    namespace, owner, started = map(int, NAME.fullmatch(prefix).groups())
    return namespace != _namespace() or _started(owner) == started


def _remove(path: Path) -> None:
    """Remove a file or folder, also when another process is about the same: what it took meanwhile is gone as well."""
    while path.exists() or path.is_symlink():
        try:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        except FileNotFoundError:
            continue


def _namespace() -> int:
    return Path("/proc/self/ns/pid").stat().st_ino


def _started(process_id: int) -> int | None:
    """When a process started, in clock ticks since boot; None where there is none or only its zombie is left."""
    try:
        # The second field is the program's name in brackets, which may hold anything.
        fields = (
            Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])

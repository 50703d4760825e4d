"""`python pipeline/shared/owned_process.py COMMAND...`: a command that ends at the latest with the process that started it.

The leash reads its standard input, a pipe that only its owner holds open, and so detects the owner's end of any cause. A
stage without its owner would keep DVC's locks; so would an exited stage that no process waits for, because DVC treats the
owner of a lock as alive while its process id exists. The leash therefore outlives its command, also where the container's
first process does not wait for orphans, and ends what its command left.

serving/server/watchdog.py is another process: it starts no command, because the supervisor needs Triton as its own child,
and it removes Triton's shared memory, which needs psutil; this file runs alone, with the standard library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

PATIENCE = 5.0  # seconds between SIGTERM and SIGKILL; torchrun ends its workers in it
POLL = 0.05  # seconds


def start_on_leash(
    command: Sequence[str], environment: Mapping[str, str] | None = None, output: IO[str] | int | None = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, which ends when this process does; end it sooner with `end_leash`.

    output: for standard output and error together; a pipe by default. The returned process has the command's exit
    status.
    """
    return subprocess.Popen(
        [sys.executable, "-I", str(Path(__file__)), *command],
        env=None if environment is None else dict(environment),
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def end_leash(process: subprocess.Popen[str]) -> int:
    """End the command, unless it has ended, and all that it started in its process group.

    Gives its exit status, 128 + n where signal n ended it.
    """
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    return process.wait()


def main(command: Sequence[str]) -> int:
    """Run the command until it or the owner ends; the command's exit status, 128 + n where signal n ended it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # A function and not SIG_IGN, which the command would inherit.
        signal.signal(number, lambda *_: None)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    threading.Thread(
        target=lambda: (os.read(0, 1), _end(child.pid)), daemon=True
    ).start()  # read returns at the owner's end
    # Not reaped yet: until then no other process can get its id, which is its group's.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    _end(child.pid)  # what it started ends with it, also where only DVC was killed and its stage runs
    status = child.wait()
    return status if status >= 0 else 128 - status


def _end(group: int) -> None:
    """Send SIGTERM to the process group, and SIGKILL to what remains after PATIENCE seconds."""
    with contextlib.suppress(ProcessLookupError):  # the whole group has exited and was reaped
        os.killpg(group, signal.SIGTERM)
        deadline = time.monotonic() + PATIENCE
        while _lives(group) and time.monotonic() < deadline:
            time.sleep(POLL)
        os.killpg(group, signal.SIGKILL)


def _lives(group: int) -> bool:
    """Whether the process group has a process that has not exited."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The second field is the program's name in brackets, which may hold anything.
            state, _, its_group = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if its_group == str(group) and state not in "ZX":
                return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

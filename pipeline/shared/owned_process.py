"""`python pipeline/shared/owned_process.py COMMAND...`: run a command that ends when the process that started it ends.

This wrapper process reads its standard input, a pipe that only its owner holds open, and so detects the end of the
owner by any cause. A stage that outlives its owner would keep DVC's locks. An exited stage that no process waits for
would keep them too, because DVC treats the owner of a lock as alive while its process id exists. The wrapper therefore
outlives its command, also in a container whose first process does not reap orphans, and ends the command's remaining
processes.

serving/server/watchdog.py is a separate program: it starts no command, because Triton must be a child of the
supervisor, and it removes Triton's shared memory, which needs psutil. This file runs alone, with the standard library.
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

KILL_AFTER = 5.0  # seconds between SIGTERM and SIGKILL; torchrun ends its workers within this time
POLL = 0.05  # seconds


def start_owned_process(
    command: Sequence[str], environment: Mapping[str, str] | None = None, output: IO[str] | int | None = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Start a command in a separate process group that ends when this process ends; `end_owned_process` ends it earlier.

    output: for standard output and standard error together; a pipe by default. The returned process has the exit status
    of the command.
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


def end_owned_process(process: subprocess.Popen[str]) -> int:
    """End the command, if it still runs, and all processes of its process group.

    Returns the command's exit status, 128 + n if signal n ended it.
    """
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    return process.wait()


def main(command: Sequence[str]) -> int:
    """Run the command until it or the owner ends. Returns its exit status, 128 + n if signal n ended it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # A function instead of SIG_IGN, which the command would inherit.
        signal.signal(number, lambda *_: None)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)

    def end_with_owner() -> None:
        os.read(0, 1)  # returns when the owner exits
        _kill_group(child.pid)

    threading.Thread(target=end_with_owner, daemon=True).start()
    # WNOWAIT does not reap the child, so that its id, which is the group's id, is not reused before _kill_group.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    _kill_group(child.pid)  # ends child processes too, for example a stage that still runs after DVC was killed
    status = child.wait()
    return status if status >= 0 else 128 - status


def _kill_group(group: int) -> None:
    """Send SIGTERM to the process group, and SIGKILL to what remains after KILL_AFTER seconds."""
    with contextlib.suppress(ProcessLookupError):  # the whole group has exited and was reaped
        os.killpg(group, signal.SIGTERM)
        deadline = time.monotonic() + KILL_AFTER
        while _group_runs(group) and time.monotonic() < deadline:
            time.sleep(POLL)
        os.killpg(group, signal.SIGKILL)


def _group_runs(group: int) -> bool:
    """Whether the process group has a process that has not exited."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The second field is the program's name in brackets, which may contain any characters.
            state, _, its_group = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if its_group == str(group) and state not in "ZX":
                return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

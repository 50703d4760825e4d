"""`python pipeline/flows/leash.py COMMAND...`: a command that never outlives the process which asked for it.

The leash waits on its standard input, a pipe that its owner alone holds open, and so learns of the owner's end whatever
its cause. A stage that went on alone would hold DVC's locks and train for nobody; so would one that ended and was never
waited for, since DVC takes the owner of a lock to be alive as long as its process id is known. The leash therefore
outlives its command, also where the container's first process waits for no orphans, and ends what its command left.
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

    output: where standard output and error go together; a pipe by default. The process given back exits as the
    command does.
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
    """Run the command until it ends or our owner does; the command's exit status, 128 + n where signal n ended it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # A function and not SIG_IGN, which the command would inherit.
        signal.signal(number, lambda *_: None)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    threading.Thread(target=_end_with_owner, args=(child.pid,), daemon=True).start()
    # Not waited for yet: until then nobody else can get its id, which is that of its group.
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    _end(child.pid)  # what it started ends with it, also where DVC alone was killed and its stage goes on
    status = child.wait()
    return status if status >= 0 else 128 - status


def _end_with_owner(group: int) -> None:
    os.read(0, 1)  # nothing is ever written: it returns at the owner's end
    _end(group)


def _end(group: int) -> None:
    """SIGTERM to whoever is left in the process group, and SIGKILL after a while."""
    _signal(group, signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    while _lives(group) and time.monotonic() < deadline:
        time.sleep(POLL)
    _signal(group, signal.SIGKILL)


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


def _lives(group: int) -> bool:
    """Whether anybody is left in the process group who has not ended."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The second field is the program's name in brackets, which may hold anything.
            state, _, its_group = path.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if its_group == str(group) and state not in "ZX":
                return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

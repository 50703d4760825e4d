"""Process priority (niceness): work that serves no request yet runs at lower priority than the serving processes.

Why: a model load (about 0.5 s of CPU time), a rehearsal and golden requests run on the cores that serve requests. At
equal priority they would delay these requests. An inference process therefore starts with a higher niceness and gets
the server's niceness back when its model is ready (serving/triton/start.py). Linux has a niceness for each thread.
Every user may increase it; to decrease it again needs RLIMIT_NICE or CAP_SYS_NICE (`LimitNICE=+0` in a systemd unit,
`--ulimit nice=20` of a container).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from serving.triton import start

# A model with this file in its version folder returns to the server's priority when it is ready.
START_NAME = Path(start.__file__).name
# Niceness added while an inference process starts: it halved the median latency of requests during a load (15 to 7 ms).
# At 10 on a busy machine the start took so long that Triton aborted with a lock_exception (docs/experiments.md).
START_NICENESS = 5
MAX_NICENESS = 19
# A pause lasts PAUSE_RATIO times as long as the work before it, at most LONGEST_PAUSE seconds.
PAUSE_RATIO, LONGEST_PAUSE = 4.0, 0.1
Item = TypeVar("Item")


def throttled(
    items: Iterable[Item], clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], object] = time.sleep
) -> Iterator[Item]:
    """Iterate with a pause after the work on each item, so that user requests get most of the server's time."""
    for item in items:
        started = clock()
        yield item
        sleep(min(PAUSE_RATIO * (clock() - started), LONGEST_PAUSE))


def niceness() -> int:
    """The niceness of the calling thread; its child processes and threads inherit it."""
    return os.getpriority(os.PRIO_PROCESS, 0)


def lower_priority(session: int, target: int) -> None:
    """Lower the priority of a session: set the niceness of its leader, which processes started later inherit.

    session: the process id of the leader. With autogroups a niceness counts only within the processes of a session, so
    the niceness of the group is set too.
    """
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, session, target)
    with contextlib.suppress(OSError):  # the kernel has no autogroups, or the process has exited
        Path(f"/proc/{session}/autogroup").write_text(str(target), encoding="ascii")


def can_raise_priority(target: int) -> bool:
    """Whether a process of this user with a higher niceness can return to this one; tried in a temporary thread."""
    raised = []

    def try_raise() -> None:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(target + START_NICENESS, MAX_NICENESS))
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, thread, target)
            raised.append(True)

    thread = threading.Thread(target=try_raise)
    thread.start()
    thread.join()
    return bool(raised)


def write_stub_launcher(
    path: Path, stub: Path, target: int, can_raise: Callable[[int], bool] = can_raise_priority
) -> dict[str, str]:
    """Write the file that Triton starts as its Python stub: it starts inference processes at lower priority.

    stub: of the installation. target: the server's niceness, to which a ready model returns; a model without start.py
    starts at it. The file is only a link to `stub` if `target` is above 0, if the niceness cannot be decreased again, or
    if programs in this folder cannot run (noexec). Returns the environment variables that the server needs for it.
    """
    if target <= 0 and can_raise(target):
        program = shlex.quote(str(stub))
        # The first argument is the path of model.py. The shell adds no process: exec replaces it.
        path.write_text(
            f'#!/bin/sh\n[ -f "${{1%/*}}/{START_NAME}" ] && exec nice -n {START_NICENESS} {program} "$@"\n'
            f'exec {program} "$@"\n',
            encoding="utf-8",
        )
        path.chmod(0o700)
        if os.access(path, os.X_OK):  # false where the folder for temporary files is mounted noexec
            return {start.VARIABLE: str(target)}
        path.unlink()
    path.symlink_to(stub)
    return {}

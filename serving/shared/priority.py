"""Priorities: what only gets ready stands back for what answers users on the same cores.

Linux keeps a niceness for each thread. Anyone may raise his own; to lower it again takes RLIMIT_NICE or CAP_SYS_NICE
(`LimitNICE=+0` in a systemd unit, `--ulimit nice=20` of a container).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from serving.triton import start

START_NAME = Path(start.__file__).name  # a model with this file beside it takes its full priority up once it is ready
# Niceness that is added. More would not pay, and Triton ends itself over a lock when a stub starts so slowly that it
# takes ten seconds for what is a moment's work.
STARTING = 5
LOWEST = 19
REST, LONGEST_REST = 4.0, 0.1  # times as long as the work before, seconds
Item = TypeVar("Item")


def unhurried(items: Iterable[Item]) -> Iterator[Item]:
    """The items, with a rest after what is done with each: those who ask meanwhile get most of the server's time."""
    for item in items:
        begun = time.monotonic()
        yield item
        time.sleep(min(REST * (time.monotonic() - begun), LONGEST_REST))


def niceness() -> int:
    """The niceness of the calling thread, which its children and threads start with."""
    return os.getpriority(os.PRIO_PROCESS, 0)


def stand_back(session: int, wanted: int) -> None:
    """Have the leader of a session, and what it starts from now on, stand back for the rest of the machine.

    Linux groups processes by session where autogroups are on, and a niceness then counts within its group alone.
    """
    with contextlib.suppress(ProcessLookupError):
        os.setpriority(os.PRIO_PROCESS, session, wanted)
    with contextlib.suppress(OSError):  # no autogroups in this kernel, or the process has gone
        Path(f"/proc/{session}/autogroup").write_text(str(wanted), encoding="ascii")


def may_rise_to(wanted: int) -> bool:
    """Whether a process of ours that stands back may go to this niceness again; tried on a thread that ends."""
    risen = []

    def rise() -> None:
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, min(wanted + STARTING, LOWEST))
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, thread, wanted)
            risen.append(True)

    thread = threading.Thread(target=rise)
    thread.start()
    thread.join()
    return bool(risen)


def write_stub_starter(path: Path, stub: Path, wanted: int) -> dict[str, str]:
    """Put at `path` what Triton starts in the place of a stub: one that stands back until its model is ready.

    Only where it may rise to the niceness `wanted` afterwards, where programs in this folder run, and for a model that
    will rise: the others start as they always did. Returns the environment variables that the server needs for it.
    """
    if wanted <= 0 and may_rise_to(wanted):
        program = shlex.quote(str(stub))
        # A shell of its own, as Triton itself starts one for every stub. The first argument is the path of model.py.
        path.write_text(
            f'#!/bin/sh\n[ -f "${{1%/*}}/{START_NAME}" ] && exec nice -n {STARTING} {program} "$@"\nexec {program} "$@"\n',
            encoding="utf-8",
        )
        path.chmod(0o700)
        if os.access(path, os.X_OK):  # not where the folder for temporary files is mounted noexec
            return {start.VARIABLE: str(wanted)}
        path.unlink()
    path.symlink_to(stub)
    return {}

"""How much of the cores other work took while a benchmark measured: a ratio of two speeds means nothing on a busy machine."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

TICKS = os.sysconf("SC_CLK_TCK")  # a second, in /proc/stat
MOST = 0.1  # of all cores, above which a ratio is not printed


class OtherWork:
    """Processor time that processes other than this one and its descendants take, from its making on."""

    def __init__(self) -> None:
        self._before = cores_ticks(), own_seconds()

    def share(self) -> float:
        """Their share of all cores so far, 0 to 1."""
        (total, idle), own = self._before
        total_now, idle_now = cores_ticks()
        passed = (total_now - total) / TICKS
        busy = passed - (idle_now - idle) / TICKS
        return max(0.0, busy - (own_seconds() - own)) / passed if passed else 0.0

    def ratio(self, text: str) -> str:
        """The text of a ratio that was measured meanwhile; in its place why there is none, where other work took too much."""
        return quiet_ratio(text, self.share())


def quiet_ratio(text: str, others: float, most: float = MOST) -> str:
    """The text of a ratio; in its place why there is none, where the share of other work is above `most`."""
    return text if others <= most else f"none: other work took {others:.0%} of the cores"


def cores_ticks() -> tuple[int, int]:
    """Ticks of all cores since the start, and those of them in which nothing ran (proc(5))."""
    fields = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]))
    return sum(fields), fields[3] + fields[4]


def own_seconds() -> float:
    """Processor time of this process and its descendants, those that have ended included."""
    seconds = 0.0
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        try:
            seconds += sum(process.cpu_times()[:4])  # user, system, and of the children that were waited for
        except psutil.NoSuchProcess:
            continue  # its parent counts it from now on
    return seconds

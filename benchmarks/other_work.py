"""The CPU, its use by other processes during a benchmark (with much of it a ratio of two speeds is meaningless), memory."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

TICKS = os.sysconf("SC_CLK_TCK")  # ticks per second in /proc/stat
MOST = 0.1  # share of all cores; with more other work no ratio is printed


class OtherWork:
    """CPU time of all processes except this one and its descendants, since the object was created."""

    def __init__(self) -> None:
        self._before = cores_ticks(), own_seconds()

    def share(self) -> float:
        """Return their share of all cores so far, 0 to 1."""
        (total, idle), own = self._before
        total_now, idle_now = cores_ticks()
        passed = (total_now - total) / TICKS
        busy = passed - (idle_now - idle) / TICKS
        return max(0.0, busy - (own_seconds() - own)) / passed if passed else 0.0

    def ratio(self, text: str) -> str:
        """Return the text of a ratio measured since creation, or the reason why it is not valid (see quiet_ratio)."""
        return quiet_ratio(text, self.share())


def quiet_ratio(text: str, others: float, most: float = MOST) -> str:
    """Return the text of a ratio, or a note that replaces it when the share of other work is above `most`."""
    return text if others <= most else f"none: other work took {others:.0%} of the cores"


def cores_ticks() -> tuple[int, int]:
    """Return the ticks of all cores since boot, and the idle ticks among them (proc(5))."""
    fields = list(map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9]))
    return sum(fields), fields[3] + fields[4]


def own_seconds() -> float:
    """Return the CPU time of this process and its descendants, including exited ones."""
    seconds = 0.0
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        try:
            seconds += sum(process.cpu_times()[:4])  # user, system, and both of reaped children
        except psutil.NoSuchProcess:
            continue  # exited: now part of its parent's reaped children
    return seconds


def processor() -> str:
    """Return the CPU's name and the number of cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def load_average() -> str:
    """Return the load averages of 1, 5 and 15 minutes."""
    return ", ".join(f"{value:.2f}" for value in os.getloadavg())


def memory_mebibytes(field: str) -> float:
    """Return a field of /proc/self/status in MiB: VmRSS, or VmHWM for the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024

"""Sides measured in turns, round by round, with a look before each turn at what else the machine does."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping

from benchmarks.other_work import OtherWork, cores_ticks
from benchmarks.serving_load import Measured

WATCHED = 0.3  # seconds before a turn
Side = Callable[[float], Measured]
Record = dict[str, float]


def in_rounds(name: str, sides: Mapping[str, Side], rounds: int, seconds: float) -> dict[str, list[Record]]:
    """Records by side, `rounds` of each, after every side has warmed up for a moment."""
    found: dict[str, list[Record]] = {side: [] for side in sides}
    for side in sides.values():
        side(seconds / 4)
    for number in range(rounds):
        for side, measure in sides.items():
            record = turn(measure, seconds)
            found[side].append(record)
            print(
                f"{name}, round {number + 1} of {rounds}: {side}: {record['rate']:,.1f} images/s, p50 {record['p50']:.1f}, "
                f"p99 {record['p99']:.1f} ms; before it {record['busy']:.0%} busy, load {record['load']:.2f}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    return found


def turn(measure: Side, seconds: float) -> Record:
    """One turn: images/s, p50 and p99 (ms), shares of all cores of the generator and of other work; load average before it."""
    busy, load = busy_share(), os.getloadavg()[0]
    others = OtherWork()
    found = measure(seconds)
    own = found.own_share / len(os.sched_getaffinity(0))
    return {
        "rate": found.rate, "p50": found.quantile(0.5), "p99": found.quantile(0.99), "own": own, "busy": busy, "load": load,
        "others": others.share(),
    }  # fmt: skip


def busy_share() -> float:
    """How much of all cores' time other work takes, watched for a moment in which we do nothing."""
    before = cores_ticks()
    time.sleep(WATCHED)
    total, idle = (after - then for after, then in zip(cores_ticks(), before, strict=True))
    return max(0.0, 1 - idle / total) if total else 0.0


def median(records: list[Record], field: str) -> float:
    return statistics.median(record[field] for record in records)


def ratios(ours: list[Record], against: list[Record], field: str = "rate") -> list[float]:
    """Ours / theirs, round by round."""
    return [a[field] / b[field] for a, b in zip(ours, against, strict=True)]

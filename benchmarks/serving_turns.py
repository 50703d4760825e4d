"""Measure sides in turns, round by round, with a measurement of other CPU load before each turn."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping

from benchmarks.other_work import OtherWork, cores_ticks
from benchmarks.serving_load import TurnResult

WATCHED = 0.3  # seconds of observation before a turn
Side = Callable[[float], TurnResult]
Record = dict[str, float]


def in_rounds(name: str, sides: Mapping[str, Side], rounds: int, seconds: float) -> dict[str, list[Record]]:
    """Return `rounds` records by side, after a short warm-up of every side."""
    records: dict[str, list[Record]] = {side: [] for side in sides}
    for side in sides.values():
        side(seconds / 4)
    for number in range(rounds):
        for side, measure in sides.items():
            record = turn(measure, seconds)
            records[side].append(record)
            print(
                f"{name}, round {number + 1} of {rounds}: {side}: {record['rate']:,.1f} images/s, p50 {record['p50']:.1f}, "
                f"p99 {record['p99']:.1f} ms; before it {record['busy']:.0%} busy, load {record['load']:.2f}",
                file=sys.stderr, flush=True,
            )  # fmt: skip
    return records


def turn(measure: Side, seconds: float) -> Record:
    """Measure one turn: images/s, p50 and p99 (ms), generator's and other work's share of all cores, load average."""
    busy, load = busy_share(), os.getloadavg()[0]
    others = OtherWork()
    result = measure(seconds)
    own = result.own_share / len(os.sched_getaffinity(0))
    return {
        "rate": result.rate, "p50": result.quantile(0.5), "p99": result.quantile(0.99), "own": own, "busy": busy, "load": load,
        "others": others.share(),
    }  # fmt: skip


def busy_share() -> float:
    """Return the share of all cores used by other work, measured while the benchmark is idle."""
    before = cores_ticks()
    time.sleep(WATCHED)
    total, idle = (after - then for after, then in zip(cores_ticks(), before, strict=True))
    return max(0.0, 1 - idle / total) if total else 0.0


def median(records: list[Record], field: str) -> float:
    return statistics.median(record[field] for record in records)


def ratios(ours: list[Record], against: list[Record], field: str = "rate") -> list[float]:
    """Return ours / against, round by round."""
    return [a[field] / b[field] for a, b in zip(ours, against, strict=True)]

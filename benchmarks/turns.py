"""Measure several sides of a comparison in turns, round by round, each in a separate process while the others wait."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

# A row's work: runs a number of rounds and calls Turn after each. Its setup is part of the first round (warm-up).
Turn = Callable[[], None]
Work = Callable[[int, Turn], None]
Side = Callable[[Any], dict[str, Work]]


class Cost(NamedTuple):
    """Cost of a round: wall seconds, and CPU seconds of all threads and loader workers."""

    wall: float
    cpu: float


def processor_seconds() -> float:
    """Return the CPU seconds of this process and its running children."""
    tick, total = os.sysconf("SC_CLK_TCK"), 0
    for process in ("self", *(str(worker.pid) for worker in multiprocessing.active_children())):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a loader worker that has just exited
            # Fields 14 and 15 of proc(5), counted after the name, which may contain blanks.
            total += sum(map(int, Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]))
    return total / tick


def in_turns(
    sides: dict[str, Side], setup: Any, rows: Sequence[str], rounds: int, threads: int
) -> dict[str, dict[str, list[Cost]]]:
    """Measure `rounds` rounds after a warm-up round; return the costs by row and side.

    sides: functions, importable by name, that return a side's work by row from `setup`; called in the side's process
    with `threads` threads. Raises EOFError when a side exits early, after its traceback.
    """
    context = multiprocessing.get_context("spawn")
    connections, processes = {}, []
    for name, side in sides.items():
        connections[name], child = context.Pipe()
        processes.append(context.Process(target=_work, args=(child, side, setup, threads)))
        processes[-1].start()
        child.close()
    try:
        costs = {row: _row(connections, row, rounds + 1) for row in rows}
        for connection in connections.values():
            connection.send(None)
        return costs
    finally:
        for process in processes:
            process.join(5)
            process.terminate()


def _row(connections: dict[str, Connection], row: str, rounds: int) -> dict[str, list[Cost]]:
    print(f"{row} ...", file=sys.stderr, flush=True)
    for connection in connections.values():
        connection.send((row, rounds))
        connection.recv()
    costs: dict[str, list[Cost]] = {name: [] for name in connections}
    for _ in range(rounds):
        for name, connection in connections.items():
            connection.send("go")
            costs[name].append(connection.recv())
    for connection in connections.values():
        connection.send("go")
        connection.recv()
    return {name: taken[1:] for name, taken in costs.items()}


def _work(connection: Connection, side: Side, setup: Any, threads: int) -> None:
    # Protocol: receive a row and a number of rounds; then run one round per message and send its cost.
    torch.set_num_threads(threads)
    with contextlib.redirect_stdout(sys.stderr):
        work = side(setup)
        while (command := connection.recv()) is not None:
            row, rounds = command
            begin = Cost(0.0, 0.0)

            def turn() -> None:
                nonlocal begin
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()
                connection.send(Cost(time.perf_counter() - begin.wall, processor_seconds() - begin.cpu))
                connection.recv()
                begin = Cost(time.perf_counter(), processor_seconds())

            turn()  # ready
            work[row](rounds, turn)
            connection.send(None)

"""Promotion log of a repository (promotions.jsonl): one JSON line for each promotion and rollback, with its time."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from serving.shared.terminal import print

LOG_NAME = "promotions.jsonl"  # Triton ignores files beside the model folders


@dataclass(frozen=True)
class Change:
    """One change of the champion. at: seconds since the epoch. action: `promote` or `rollback`."""

    at: float
    action: str
    version: int
    previous: int


def record(repository: Path, action: str, version: int, previous: int) -> None:
    """Append a completed change. On a full disk it only prints a warning: the champion has already changed."""
    line = json.dumps(asdict(Change(time.time(), action, version, previous))) + "\n"
    try:
        with (repository / LOG_NAME).open("a+b") as stream:
            if stream.tell() and _last_byte(stream.name) != b"\n":  # a killed process left half a line
                stream.write(b"\n")
            stream.write(line.encode())
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        print(f"tailor: {repository / LOG_NAME}: {error.strerror}; this change is not recorded", file=sys.stderr)


def read_changes(repository: Path) -> list[Change]:
    """All changes, oldest first; incomplete lines are skipped. Empty if no promotion was recorded."""
    try:
        lines = (repository / LOG_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    changes = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):
            changes.append(Change(**json.loads(line)))
    return changes


def champions(repository: Path) -> list[int]:
    """The line of champions that led to the present one, ascending.

    Versions that were rolled back from are left out. Empty if no promotion was recorded.
    """
    line: set[int] = set()
    for change in read_changes(repository):
        older = {version for version in {*line, change.previous} if 0 < version < change.version}
        line = {*older, change.version}
    return sorted(line)


def ever_champion(repository: Path) -> set[int]:
    """All versions that were ever champion. Empty if no promotion was recorded."""
    return {version for change in read_changes(repository) for version in (change.version, change.previous)}


def _last_byte(path: str) -> bytes:
    with Path(path).open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1)

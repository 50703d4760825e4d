"""When which version became the champion: a line for each promotion and rollback, in the repository itself."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from serving.shared.terminal import print

LOG_NAME = "promotions.jsonl"  # Triton looks at folders alone


@dataclass(frozen=True)
class Change:
    """One change of champion. at: seconds since the epoch, by the wall clock. action: `promote` or `rollback`."""

    at: float
    action: str
    version: int
    previous: int


def record(repository: Path, action: str, version: int, previous: int) -> None:
    """Append a change that has taken place; a line of a full disk is missed, and said, as the champion stays changed."""
    line = json.dumps(asdict(Change(time.time(), action, version, previous))) + "\n"
    try:
        with (repository / LOG_NAME).open("a+b") as stream:
            if stream.tell() and _last_byte(stream.name) != b"\n":  # what a killed process left half-written
                stream.write(b"\n")
            stream.write(line.encode())
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        print(f"tailor: {repository / LOG_NAME}: {error.strerror}; the promotion is not in it", file=sys.stderr)


def read_changes(repository: Path) -> list[Change]:
    """Every change, oldest first; lines that are not whole are passed over. Empty where nothing was ever promoted."""
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
    """The versions that were champion one after another and led to the one of today, ascending.

    One that was rolled back from is not among them. Empty where nothing was ever promoted.
    """
    line: set[int] = set()
    for change in read_changes(repository):
        older = {version for version in {*line, change.previous} if 0 < version < change.version}
        line = {*older, change.version}
    return sorted(line)


def ever_champion(repository: Path) -> set[int]:
    """The versions that were champion at any time. Empty where no promotion was recorded."""
    return {version for change in read_changes(repository) for version in (change.version, change.previous)}


def _last_byte(path: str) -> bytes:
    with Path(path).open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1)

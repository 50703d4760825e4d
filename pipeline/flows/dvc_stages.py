"""DVC's stages as the flow sees them: which there are, which have changed, and one of them reproduced.

What is up to date, what comes from the cache and what was made from what stays DVC's to say; nothing of it is kept here.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import networkx
from dvc.exceptions import DvcException
from dvc.repo import Repo

from pipeline.shared.errors import StageError
from pipeline.shared.owned_process import end_leash, start_on_leash

RELEASE = "export"  # the stage whose outs are a release
CODE = "code"  # the stage of a user's project that hashes the installed source files, for all others to depend on
MISUSE = 2
# What DVC adds for whoever typed the command.
HINTS = ("To track the changes with git", "To enable auto staging", "Use `dvc push`", "git add ", "dvc config ")
LAST_WORDS = 5.0  # seconds
TAIL = 12  # lines of a failed stage that its error may be in


class StageFailed(StageError):
    """A stage did not end well. `status` is its command's exit code, None where DVC itself failed."""

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status = status


def stage_names(root: Path | None = None) -> list[str]:
    """The stages that a release is made by, each after those it depends on, else in dvc.yaml's order."""
    with _repo(root) as repo:
        graph = repo.index.graph
        order = {stage: place for place, stage in enumerate(repo.index.stages)}
        wanted = [stage for stage in graph if getattr(stage, "name", None) == RELEASE]
        if not wanted:
            raise StageError(f"dvc.yaml: has no stage {RELEASE!r}; expected the stages that make a release")
        part = graph.subgraph({wanted[0], *networkx.descendants(graph, wanted[0])})
        stages = networkx.lexicographical_topological_sort(part.reverse(), key=order.__getitem__)
        return [stage.name for stage in stages if getattr(stage, "name", None)]


def changed_stages(names: list[str], root: Path | None = None) -> list[str]:
    """Those of the stages that `dvc repro` would run, or fetch from its cache."""
    with _repo(root) as repo:
        found = repo.status(targets=names)
    return [name for name in names if name in found]


def reproduce(name: str, say: Callable[[str], None], limit: float | None = None) -> bool:
    """Reproduce one stage by `dvc repro --single-item`; whether there was anything to do.

    say: takes each line that DVC and the stage print. limit: seconds that it may take. The stage ends when this process
    ends. Raises StageFailed with the stage's own last line.
    """
    if not changed_stages([name]):
        return False
    binaries = str(Path(sys.executable).parent)  # where the stage's `python` is ours
    environment = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}", "DVC_NO_ANALYTICS": "1"}
    process = start_on_leash([sys.executable, "-P", "-m", "dvc", "repro", "--single-item", name], environment)
    lines: deque[str] = deque(maxlen=TAIL)
    reader = threading.Thread(target=_read, args=(process.stdout, lines, say), daemon=True)
    reader.start()
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        raise StageFailed(
            f"stage {name} did not end within {limit:g} s; set retrain.stage_hours higher", None
        ) from None
    finally:
        end_leash(process)
        # Something that left the process group may hold the pipe open for as long as it likes.
        reader.join(LAST_WORDS)
    if status:
        raise _failure(name, list(lines))
    return True


def _read(stream: IO[str], lines: deque[str], say: Callable[[str], None]) -> None:
    """Say each line that is not a hint of DVC's, and keep the last ones."""
    for line in filter(None, map(str.rstrip, stream)):
        if not line.lstrip().startswith(HINTS):
            say(line)
        lines.append(line)


def _failure(name: str, lines: list[str]) -> StageFailed:
    """DVC's and the stage's last words as one error."""
    text = "\n".join(lines)
    ended = re.search(r"exited with (-?\d+)", text)
    own = [line for line in lines if line.startswith(f"{name}: ")]
    dvcs = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    said = (own or dvcs or lines or ["it said nothing"])[-1]
    return StageFailed(f"stage {name} failed: {said.removeprefix(f'{name}: ')}", int(ended[1]) if ended else None)


@contextmanager
def _repo(root: Path | None):
    """DVC's view of the project. Raises StageError in one line."""
    logging.getLogger("dvc").setLevel(logging.ERROR)  # it reports progress as if to a terminal
    try:
        with Repo(root and str(root)) as repo:
            yield repo
    except DvcException as error:
        raise StageError(f"dvc: {' '.join(str(error).split())}") from error

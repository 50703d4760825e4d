"""List DVC stages, list the changed ones, and reproduce one stage.

DVC alone decides which stages are up to date and which outputs come from its cache; this module keeps no state.
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

from models.image_names import NOT_UTF8
from pipeline.shared.errors import StageError
from pipeline.shared.owned_process import end_owned_process, start_owned_process

RELEASE = "export"  # the stage whose outputs are a release
CODE = "code"  # the stage of a user's project that hashes the installed source files, for all others to depend on
MISUSE = 2
# Beginnings of DVC's hints for interactive users.
HINTS = ("To track the changes with git", "To enable auto staging", "Use `dvc push`", "git add ", "dvc config ")
READ_TIMEOUT = 5.0  # seconds; to read the last output of an ended stage
TAIL = 12  # last lines of a failed stage in which its error is searched


class StageFailed(StageError):
    """A stage failed. `status` is the exit code of its command; None if DVC failed or the stage timed out."""

    def __init__(self, message: str, status: int | None) -> None:
        super().__init__(message)
        self.status = status


def stage_names() -> list[str]:
    """Names of the stages that produce a release, in topological order; ties in dvc.yaml's order."""
    with _open_repo() as repo:
        graph = repo.index.graph
        order = {stage: index for index, stage in enumerate(repo.index.stages)}
        releases = [stage for stage in graph if getattr(stage, "name", None) == RELEASE]
        if not releases:
            raise StageError(f"dvc.yaml: no stage {RELEASE!r}; expected the stages that produce a release")
        ancestors = graph.subgraph({releases[0], *networkx.descendants(graph, releases[0])})
        stages = networkx.lexicographical_topological_sort(ancestors.reverse(), key=order.__getitem__)
        return [stage.name for stage in stages if getattr(stage, "name", None)]


def changed_stages(names: list[str]) -> list[str]:
    """The given stages that `dvc repro` would run or restore from its cache."""
    with _open_repo() as repo:
        changed = repo.status(targets=names)
    return [name for name in names if name in changed]


def reproduce(name: str, log: Callable[[str], None], timeout: float | None = None) -> bool:
    """Reproduce one stage with `dvc repro --single-item`. Returns False if the stage was up to date.

    log: called with each line that DVC and the stage print. timeout: in seconds. The stage ends when this process
    ends. Raises StageFailed with the last line of the stage.
    """
    if not changed_stages([name]):
        return False
    binaries = str(Path(sys.executable).parent)  # so that `python` in a stage is this interpreter
    environment = os.environ | {"PATH": f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}", "DVC_NO_ANALYTICS": "1"}
    process = start_owned_process([sys.executable, "-P", "-m", "dvc", "repro", "--single-item", name], environment)
    lines: deque[str] = deque(maxlen=TAIL)
    reader = threading.Thread(target=_read, args=(process.stdout, lines, log), daemon=True)
    reader.start()
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        message = f"stage {name} did not end within {timeout:g} s; set retrain.stage_hours higher"
        raise StageFailed(message, None) from None
    finally:
        end_owned_process(process)
        # A process that left the process group may keep the pipe open, so the wait is bounded.
        reader.join(READ_TIMEOUT)
    if status:
        raise _failure(name, list(lines))
    return True


def _read(stream: IO[str], lines: deque[str], log: Callable[[str], None]) -> None:
    """Pass each line that is not a DVC hint to `log`, and append every line to `lines`."""
    for line in filter(None, map(str.rstrip, stream)):
        if not line.lstrip().startswith(HINTS):
            log(line)
        lines.append(line)


def _failure(name: str, lines: list[str]) -> StageFailed:
    """Make the error of a failed stage from the last lines of DVC and the stage."""
    status = re.search(r"exited with (-?\d+)", "\n".join(lines))
    stage_errors = [line for line in lines if line.startswith(f"{name}: ")]
    dvc_errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    cause = (stage_errors or dvc_errors or lines or ["it printed nothing"])[-1].removeprefix(f"{name}: ")
    return StageFailed(f"stage {name} failed: {cause}", int(status[1]) if status else None)


@contextmanager
def _open_repo():
    """Open the working folder's project as a DVC repository.

    DvcException becomes a StageError of one line, and DVC's UnicodeError one that names the file.
    """
    logging.getLogger("dvc").setLevel(logging.ERROR)  # DVC logs progress messages at lower levels
    try:
        with Repo() as repo:
            yield repo
    except DvcException as error:
        raise StageError(f"dvc: {' '.join(str(error).split())}") from error
    except UnicodeEncodeError as error:
        raise StageError(f"{error.object}: {NOT_UTF8}") from None

"""A decided run as a DVC experiment, which `tailor experiments` lists beneath the commit that it started from.

An experiment is a commit under refs/exps. `dvc exp save` makes it by stashing the working tree and checking the commit out:
killed in the middle of that it leaves the user's params.yaml changed back; it also records in dvc.lock that every stage is
up to date, the ones that the run did not reproduce too. The commit is therefore made here, by git and an index of its own:
files, index, branch and stash stay as they are, and the last command alone makes it known, whole or not at all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from dvc.repo.experiments.refs import ExpRefInfo

from pipeline.flows.records import Decided, now
from pipeline.params import Params, load_params
from pipeline.shared.errors import StageError, TailorError, explain
from pipeline.shared.owned_process import end_leash, start_on_leash

LIMIT = 120.0  # seconds for all of it; where git tracks the images, it reads what has changed of them
STATE = ("dvc.yaml", "dvc.lock", "params.yaml")  # what DVC reads of an experiment, whether git tracks it yet or not
AUTHOR = {"NAME": "tailor retrain", "EMAIL": "tailor@localhost"}  # a schedule need not have an identity in git


class ExperimentError(StageError):
    """The run cannot be kept as an experiment; the message ends with what would help."""


def keep_run(decided: Decided, why: str, params: Params, say: Callable[[str], None]) -> None:
    """Keep the project as it is as the experiment of a decided run; say its name, or in one line why there is none.

    why: the decision in words, the experiment's message. params: those that the run began with.
    """
    name = f"retrain-{now():%Y%m%d-%H%M%S}-{decided.ending}"
    if decided.version:
        name = f"{name}-{decided.version}"
    try:
        if load_params() != params:
            raise ExperimentError("params.yaml was changed while the run went on; `tailor retrain` takes the change up")
        save(name, f"retrain: {decided.ending}: {why}")
    except (TailorError, OSError) as error:
        say(f"not kept as a DVC experiment: {explain(error)}")
    else:
        say(f"kept as the DVC experiment {name}; `tailor experiments` lists it")


def save(name: str, message: str, limit: float = LIMIT) -> None:
    """Save the working folder's project as the experiment `name`, which replaces one of that name on the same commit.

    limit: seconds that it may take. Raises ExperimentError.
    """
    if not shutil.which("git"):
        raise ExperimentError("git is not installed; install it, and commit the project")
    deadline = time.monotonic() + limit
    with tempfile.TemporaryDirectory(prefix="tailor-experiment-") as folder:
        scratch = Path(folder)
        plain = _environment(scratch / "index")

        def git(*arguments: str, otherwise: str | None = None) -> str:
            return _git(arguments, plain, scratch / "said", deadline, otherwise)

        home = git(
            "rev-parse", "--git-dir", otherwise="this folder is in no git repository; `git init`, then commit it"
        )
        none = "git has no commit yet; `git commit` dvc.yaml, dvc.lock and params.yaml"
        baseline = git("rev-parse", "--verify", "--quiet", "HEAD^{commit}", otherwise=none)
        index = Path(home) / "index"
        # A copy of it knows which files have not changed, and which are not checked out on purpose.
        shutil.copyfile(index, scratch / "index") if index.is_file() else git("read-tree", "HEAD")
        git("add", "--update", "--", ":/")
        git("add", "--force", "--", *[path for path in STATE if Path(path).is_file()])
        made = git("commit-tree", "--no-gpg-sign", "-p", baseline, "-m", message, git("write-tree"))
        git("update-ref", str(ExpRefInfo(baseline, name)), made)


def _environment(index: Path) -> dict[str, str]:
    """Git with an index and an author of its own, its words in English, and no questions."""
    author = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in AUTHOR.items()}
    return os.environ | author | {"GIT_INDEX_FILE": str(index), "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}


def _git(
    arguments: tuple[str, ...], environment: Mapping[str, str], said: Path, deadline: float, otherwise: str | None
) -> str:
    """The last line that git prints. Raises ExperimentError.

    otherwise: the error in place of git's own where git finds no repository, or fails without a word.
    """
    # Into a file, as nobody empties a pipe here.
    with said.open("w+", encoding="utf-8", errors="replace") as output:
        process = start_on_leash(["git", *arguments], environment, output)
        try:
            status = process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            raise ExperimentError(f"git {arguments[0]} did not end in time; try it by hand") from None
        finally:
            end_leash(process)
        output.seek(0)
        lines = output.read().splitlines() or [""]
    if status:
        cause = next((line for line in lines if line.startswith(("fatal: ", "error: "))), lines[0])
        if otherwise and (not cause or "not a git repository" in cause):
            raise ExperimentError(otherwise)
        raise ExperimentError(f"git {arguments[0]} failed: {cause or f'status {status}'}; see `git status`")
    return lines[-1]

"""Save a retraining run with its decision as a DVC experiment, which `tailor experiments` lists below its base commit.

An experiment is a commit under refs/exps. `dvc exp save` stashes the working tree and checks out the commit: if it is
killed meanwhile, the user's params.yaml is left reverted. It also records every stage as up to date in dvc.lock,
including stages that the run did not reproduce. This module therefore creates the commit with git and a temporary
index: the user's files, index, branch and stash do not change, and the last command, `git update-ref`, is atomic.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from dvc.repo.experiments.refs import ExpRefInfo

from pipeline.flows.records import DecisionRecord, now
from pipeline.params import Params, load_params
from pipeline.shared.errors import StageError, TailorError, explain
from pipeline.shared.owned_process import end_owned_process, start_owned_process

TIMEOUT = 120.0  # seconds for all git commands; if git tracks the images, it reads the changed ones
STATE = ("dvc.yaml", "dvc.lock", "params.yaml")  # files that DVC reads from an experiment; git may not track them yet
AUTHOR = {"NAME": "tailor retrain", "EMAIL": "tailor@localhost"}  # a scheduled run may have no git identity


class ExperimentError(StageError):
    """The run cannot be saved as an experiment; the message ends with the remedy."""


def save_experiment(decided: DecisionRecord, why: str, params: Params, log: Callable[[str], None]) -> None:
    """Save the current state of the project as the experiment of a decided run.

    Passes one line to `log`: the experiment's name, or the reason if it was not saved. why: text of the decision, used
    as the message of the experiment. params: the params with which the run started.
    """
    name = f"retrain-{now():%Y%m%d-%H%M%S}-{decided.ending}"
    if decided.version:
        name = f"{name}-{decided.version}"
    try:
        if load_params() != params:
            raise ExperimentError("params.yaml was changed during the run; `tailor retrain` uses the change")
        create_experiment(name, f"retrain: {decided.ending}: {why}")
    except (TailorError, OSError) as error:
        log(f"not saved as a DVC experiment: {explain(error)}")
    else:
        log(f"saved as the DVC experiment {name}; `tailor experiments` lists it")


def create_experiment(name: str, message: str, timeout: float = TIMEOUT) -> None:
    """Save the working folder's project as the experiment `name`, replacing one of that name on the same commit.

    timeout: in seconds. Raises ExperimentError.
    """
    if not shutil.which("git"):
        raise ExperimentError("git is not installed; install it, and commit the project")
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="tailor-experiment-") as folder:
        scratch = Path(folder)
        author = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in AUTHOR.items()}
        english = {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
        environment = os.environ | author | english | {"GIT_INDEX_FILE": str(scratch / "index")}
        git = partial(_run_git, environment, scratch / "output", deadline)
        no_repository = "this folder is in no git repository; `git init`, then commit it"
        index = Path(git("rev-parse", "--git-dir", otherwise=no_repository)) / "index"
        no_commit = "git has no commit yet; `git commit` dvc.yaml, dvc.lock and params.yaml"
        baseline = git("rev-parse", "--verify", "--quiet", "HEAD^{commit}", otherwise=no_commit)
        # The copied index holds the stat data of unchanged files and the skip-worktree flags.
        shutil.copyfile(index, scratch / "index") if index.is_file() else git("read-tree", "HEAD")
        git("add", "--update", "--", ":/")
        git("add", "--force", "--", *[path for path in STATE if Path(path).is_file()])
        commit = git("commit-tree", "--no-gpg-sign", "-p", baseline, "-m", message, git("write-tree"))
        git("update-ref", str(ExpRefInfo(baseline, name)), commit)


def _run_git(
    environment: Mapping[str, str], log: Path, deadline: float, *arguments: str, otherwise: str | None = None
) -> str:
    """Run git and return the last line that it prints. Raises ExperimentError.

    otherwise: the error text if git finds no repository, or fails without output.
    """
    # Output goes to a file, because a pipe that is not read could fill and block git.
    with log.open("w+", encoding="utf-8", errors="replace") as output:
        process = start_owned_process(["git", *arguments], environment, output)
        try:
            status = process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            raise ExperimentError(f"git {arguments[0]} did not end in time; run it by hand") from None
        finally:
            end_owned_process(process)
        output.seek(0)
        lines = output.read().splitlines() or [""]
    if status:
        cause = next((line for line in lines if line.startswith(("fatal: ", "error: "))), lines[0])
        if otherwise and (not cause or "not a git repository" in cause):
            raise ExperimentError(otherwise)
        raise ExperimentError(f"git {arguments[0]} failed: {cause or f'status {status}'}; see `git status`")
    return lines[-1]

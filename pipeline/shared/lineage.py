"""What a result came from: the data by their content, the project by its commit (the code: pipeline/shared/fingerprint.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pipeline.shared.errors import StageError
from serving.shared.terminal import print


class GitError(StageError):
    """Git refuses to read a repository, as one of another owner; that is no answer to what was asked."""


def git(folder: Path, *arguments: str) -> str | None:
    """What a git command prints in a folder; None where there is no git, no repository or no such revision.

    Raises GitError with git's reason where the repository exists and git refuses to read it.
    """
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    except OSError:
        return None
    if "dubious ownership" in done.stderr:
        raise GitError(
            f"{folder.absolute()}: {done.stderr.splitlines()[0]}; if you trust it, "
            f"run `git config --global --add safe.directory {folder.absolute()}`"
        )
    return None if done.returncode else done.stdout.strip("\n")


def code_revision() -> str:
    """The git commit of the working folder's project, with `+changes` when its tree differs; `unknown` outside a repository.

    `unknown` too where git refuses to read it, with a line on stderr that gives its reason.
    """
    try:
        revision = git(Path(), "rev-parse", "--verify", "--quiet", "HEAD")
        if revision is None:
            return "unknown"
        return revision + ("+changes" if git(Path(), "status", "--porcelain", "--untracked-files=no") else "")
    except GitError as error:
        print(f"the commit is recorded as unknown: {error}", file=sys.stderr)
        return "unknown"

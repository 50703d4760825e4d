"""Lineage of a result: the git commit of the project. The hash of the code is in pipeline/shared/fingerprint.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pipeline.shared.errors import StageError
from serving.shared.terminal import print


class GitError(StageError):
    """Git refuses to read an existing repository, for example because another user owns it."""


def git(folder: Path, *arguments: str) -> str | None:
    """Run a git command in a folder and return its output; None if it fails or git is not installed.

    It fails without a repository or for an unknown revision. Raises GitError with git's reason if the repository exists
    and git refuses to read it.
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
    """Git commit of the working folder's project, with `+changes` if tracked files differ; `unknown` if there is none.

    Also `unknown` if git refuses to read the repository; the reason is then printed to stderr.
    """
    try:
        revision = git(Path(), "rev-parse", "--verify", "--quiet", "HEAD")
        if revision is None:
            return "unknown"
        return revision + ("+changes" if git(Path(), "status", "--porcelain", "--untracked-files=no") else "")
    except GitError as error:
        print(f"the commit is recorded as unknown: {error}", file=sys.stderr)
        return "unknown"

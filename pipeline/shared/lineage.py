"""Lineage of a result: the git commit of the project. The hash of the code is in pipeline/shared/fingerprint.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pipeline.shared.errors import StageError
from serving.shared.terminal import print

FATAL = 128  # git's exit status
NO_REPOSITORY = "not a git repository (or any"  # parent; `not a git repository: PATH` is a damaged .git file


class GitError(StageError):
    """Git refuses to read a repository, for example because another user owns it or its config is damaged."""


def git(folder: Path, *arguments: str) -> str | None:
    """Run a git command in a folder and return its output; None if it fails or git is not installed.

    It fails without a repository or for a revision that does not exist. Raises GitError with git's reason for every
    other fatal error, such as a repository that git refuses to read.
    """
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    except OSError:
        return None
    if done.returncode == FATAL and NO_REPOSITORY not in done.stderr:
        lines = done.stderr.splitlines() or ["git failed"]
        remedy = f"if you trust it, run `git config --global --add safe.directory {folder.absolute()}`"
        reason = next((line for line in lines if line.startswith("fatal: ")), lines[0])
        raise GitError(f"{folder.absolute()}: {reason}{f'; {remedy}' if 'dubious ownership' in reason else ''}")
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

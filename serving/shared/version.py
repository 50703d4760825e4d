"""Version and git commit of Tailor; imports only the standard library, because setup.py runs it."""

from __future__ import annotations

import subprocess
from pathlib import Path

TAILOR_VERSION = "0.1.0"  # pyproject.toml reads it from here
COMMIT_FILE = Path(__file__).with_name("commit.txt")  # setup.py writes it into a wheel
ROOT = Path(__file__).parents[2]  # the checkout, or site-packages


def source_commit() -> str:
    """First 12 digits of the git commit of Tailor's source, `+changes` if tracked files differ.

    Outside a checkout: the commit that the build recorded. `unknown` if no commit is recorded, git is missing, or git
    refuses to read the checkout.
    """
    if not (ROOT / ".git").exists():  # in site-packages, git would read the repository of another project
        return COMMIT_FILE.read_text(encoding="utf-8").strip() if COMMIT_FILE.is_file() else "unknown"
    commit = _git("rev-parse", "--short=12", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no") if commit else None
    return f"{commit}{'+changes' if changes else ''}" if commit else "unknown"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return None if done.returncode else done.stdout.strip()

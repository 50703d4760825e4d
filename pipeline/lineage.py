"""What a result came from: the data by their content, the code by its commit."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

from pipeline.splits import read_split


def data_sha256(split: Path) -> str:
    """sha256 over every image's split, id, label and content hash: equal for equal data, whatever wrote the tables."""
    digest = hashlib.sha256()
    for name in ("train", "validation", "test"):
        table = read_split(name, ["sample_id", "label", "sha256"], split)
        digest.update(json.dumps([name, *table.to_pydict().values()]).encode())
    return digest.hexdigest()


def code_revision() -> str:
    """The git commit that runs, with `+changes` when the working tree differs from it; `unknown` outside a repository."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"

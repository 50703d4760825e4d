"""A working copy of the project in a separate folder, for tests that run the real commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
CODE = (
    "models",
    "tailor",
    "pipeline",
    "serving",
    "recipes",
    "data/source",
    "data/ingested/README.md",
    "data/text/README.md",
    ".dvc/config",
    ".dvc/.gitignore",
    ".dvcignore",
    ".dvc-site-cache/repo/.gitignore",
)
FILES = (".gitignore", "dvc.yaml", "params.yaml")
SETTINGS = {"DVC_NO_ANALYTICS": "1", "ORT_DISABLE_TELEMETRY": "1", "COLUMNS": "200"}
GIT_NAME = ("-c", "user.name=test", "-c", "user.email=test@example.invalid")


class Project:
    """The project's code in a new git repository at `root`, with training small enough for a test."""

    def __init__(self, root: Path) -> None:
        self.root = root
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        for name in (*CODE, *FILES):
            source, target = ROOT / name, root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, target, ignore=ignored) if source.is_dir() else shutil.copyfile(source, target)
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **SETTINGS,
        }
        # `python -m` puts the copy first on the path, so it runs its own code, also under an editable install.
        self.environment.pop("PYTHONPATH", None)

    def commit(self) -> None:
        """Make the folder a git repository and commit everything that is not ignored."""
        self.run("git", "init", "--quiet", ".")
        self.run("git", "add", "-A")
        self.run("git", *GIT_NAME, "commit", "--quiet", "-m", "a project")

    def set(self, changes: dict) -> None:
        """Merge values into params.yaml through the recipe command."""
        overlay = self.root / ".overlay.yaml"
        overlay.write_text(yaml.safe_dump(changes), encoding="utf-8")
        self.run("python", "-P", "-m", "pipeline.commands", "recipe", str(overlay))
        overlay.unlink()

    def run(self, *command: str, expect: int = 0, timeout: float = 900) -> subprocess.CompletedProcess[str]:
        """Run a command in the project; assert the expected exit status."""
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == expect, (
            f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def stages_run(self, done: subprocess.CompletedProcess[str]) -> list[str]:
        """Return the stages that a `dvc repro` or `dvc exp run` ran."""
        return [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")]


class OwnProject(Project):
    """A project folder that `tailor new` creates; nothing is copied.

    binaries: folder of `tailor`, `python` and `dvc`. code: the code that they run; None for the installed package.
    """

    def __init__(self, root: Path, binaries: Path = Path(sys.executable).parent, code: Path | None = ROOT) -> None:
        self.root = root
        author = {f"GIT_{who}_{what}": "test@example" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        self.environment = os.environ | author | SETTINGS | {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
        for name in ("PYTHONPATH", "VIRTUAL_ENV"):
            self.environment.pop(name, None)
        if code:
            self.environment["PYTHONPATH"] = str(code)


SHORT = {
    "teacher": {"epochs": 12, "backbone": "resnet20", "schedule": {"kind": "cosine", "warmup_epochs": 0}},
    "student": {"epochs": 12, "backbone": "resnet20", "schedule": {"kind": "cosine", "warmup_epochs": 0}},
}

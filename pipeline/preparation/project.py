"""Create a project: a folder with params.yaml, dvc.yaml, git and DVC, in which the installed package runs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from models.image_names import NOT_UTF8, is_utf8
from pipeline.shared.artifacts import write_file
from pipeline.shared.errors import ParamsError, StageError
from pipeline.shared.lineage import GitError, git

FILES = Path(__file__).with_name("project_files")  # its dvc.yaml is named stages.yaml, else DVC would run it there
DEFAULT_PARAMS = FILES / "params.yaml"
SOURCE_README = (
    "Put one folder of images per class here, with the name of the class. Then run: tailor init data/source\n"
)
TEXT_README = "Texts of the classes, such as classes.csv; stage embed_text runs again after a change here.\n"
SITE_CACHE = ".dvc-site-cache"  # DVC resolves it against its working folder, so it must not lie in .dvc
DVC_CONFIG = {
    "core.analytics": "false",
    "core.check_update": "false",
    "core.autostage": "false",
    "core.site_cache_dir": SITE_CACHE,
}


def default_params() -> str:
    """Text of a new project's params.yaml, the default recipe."""
    return DEFAULT_PARAMS.read_text(encoding="utf-8")


def create_project(folder: Path, params: str | None = None) -> list[str]:
    """Write the files of a project into `folder`, initialise git unless it is in a repository, and initialise DVC.

    params: text of its params.yaml; None for the default recipe. Returns the commands that the user must run before stages
    can run, one line each. Raises ParamsError if `folder` is a file, has a params.yaml or dvc.yaml already or a path that
    is not UTF-8, StageError if git or DVC fail.
    """
    if not is_utf8(str(folder.resolve())):
        raise ParamsError(f"{folder.resolve()}: {NOT_UTF8}")
    if folder.exists() and not folder.is_dir():
        raise ParamsError(f"{folder}: is a file; expected a folder, or a name that does not exist yet")
    for name in ("params.yaml", "dvc.yaml"):
        if (folder / name).exists():
            raise ParamsError(f"{folder / name}: exists already; expected a folder without it for a new project")
    write_file(folder / "data/source/README.md", SOURCE_README)  # git ignores it; DVC warns about an empty folder
    _add_lines(folder / ".gitignore", (FILES / "gitignore").read_text(encoding="utf-8").splitlines())
    write_file(folder / "data/ingested/.gitignore", "*.parquet\n")  # keeps the folder, which stage split reads, in git
    write_file(folder / "data/text/README.md", TEXT_README)
    _init_git_and_dvc(folder)
    write_file(folder / "dvc.yaml", (FILES / "stages.yaml").read_text(encoding="utf-8"))
    write_file(
        folder / "params.yaml", params or default_params()
    )  # last: the folder counts as a project once this file exists
    return _path_command()


def enclosing_project(folder: Path) -> Path | None:
    """The project that contains a folder below its root; None if there is none."""
    parents = folder.absolute().parents
    return next(
        (path for path in parents if all((path / name).is_file() for name in ("params.yaml", "dvc.yaml"))), None
    )


def keep_out_of_git(folder: Path) -> bool:
    """Add a folder in the working folder to .gitignore unless git ignores or tracks it. Returns whether it was added.

    Otherwise `git add -A` and `dvc exp run` would commit its images. If git refuses to read the repository, nothing is
    added, because neither command can commit then.
    """
    here, path = Path().resolve(), folder.resolve()
    if path == here or not path.is_relative_to(here):
        return False
    name = path.relative_to(here).as_posix()
    try:
        if (
            git(here, "rev-parse", "--is-inside-work-tree") != "true"
            or git(here, "check-ignore", "--quiet", f"{name}/image") is not None
            or git(here, "--literal-pathspecs", "ls-files", "--", name)
        ):
            return False
    except GitError:
        return False
    _add_lines(Path(".gitignore"), ["/" + re.sub(r"([\\*?\[])", r"\\\1", name) + "/"])
    return True


def _add_lines(path: Path, lines: list[str]) -> None:
    """Append the lines that a text file does not have yet."""
    present = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    write_file(path, "\n".join([*present, *(line for line in lines if line not in present)]) + "\n")


def _init_git_and_dvc(folder: Path) -> None:
    """Run `git init` and `dvc init` unless done already; `dvc init --subdir` in a subfolder of a git repository."""
    options = ["--no-scm"]
    if shutil.which("git"):
        top = git(folder, "rev-parse", "--show-toplevel")
        if top is None or git(folder, "check-ignore", "--quiet", ".") is not None:
            _run_command(folder, "git", "init", "--quiet")
            top = str(folder.resolve())
        options = [] if Path(top).samefile(folder) else ["--subdir"]
    if (folder / ".dvc").is_dir():
        return
    write_file(folder / SITE_CACHE / "repo/.gitignore", "*\n!.gitignore\n")  # DVC would create a world-writable folder
    dvc = (sys.executable, "-P", "-m", "dvc")
    _run_command(folder, *dvc, "init", "--quiet", *options)
    config = "".join(f"    {key.partition('.')[2]} = {value}\n" for key, value in DVC_CONFIG.items())
    path = folder / ".dvc/config"
    write_file(path, f"[core]\n{config}" + path.read_text(encoding="utf-8").removeprefix("[core]\n"))
    _add_lines(folder / ".dvcignore", [SITE_CACHE])
    if options != ["--no-scm"]:
        _run_command(folder, "git", "add", ".dvc/config", ".dvcignore")


def _run_command(folder: Path, *command: str) -> None:
    """Run a command in the folder. Raises StageError with its first line of an error, else its first line."""
    environment = os.environ | {"DVC_NO_ANALYTICS": "1", "DVC_SITE_CACHE_DIR": SITE_CACHE}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = (result.stderr + result.stdout).split("\n")
        reason = next((line for line in lines if line.startswith(("ERROR", "fatal"))), lines[0])
        raise StageError(f"{folder}: {' '.join(command[-4:])} failed: {reason or f'status {result.returncode}'}")


def _path_command() -> list[str]:
    """The command that puts this interpreter's folder on PATH, unless it is there already."""
    python, folder = shutil.which("python"), Path(sys.executable).parent
    if python and Path(python).parent.samefile(folder):
        return []
    return [f'export PATH="{folder}:$PATH"']

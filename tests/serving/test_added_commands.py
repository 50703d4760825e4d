"""Commands that other rooms add to `tailor` by entry points."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MODULE = """
import typer

class Refused(Exception):
    exit_code = 2

def measure(width: int = 3) -> int:
    "Measure the cloth."
    if width < 0:
        raise Refused(f"--width is {width}; expected 0 or more")
    if width == 13:
        raise ValueError("a fault of ours")
    print(f"width {width}")
    return width % 2

stitch = typer.Typer(add_completion=False, rich_markup_mode=None)

@stitch.command(epilog="Example: tailor stitch cuff")
def stitching(part: str) -> None:
    "Stitch a part."
    print(f"stitched {part}")
"""
ENTRY_POINTS = """[tailor.commands]
measure = workroom:measure
stitch = workroom:stitch
press = workroom_with_an_iron:press
serve = workroom:measure
"""


@pytest.fixture
def tailor(tmp_path: Path) -> Callable[..., CompletedProcess[str]]:
    """`tailor` where a package is installed that adds commands, one of them with a package missing."""
    (tmp_path / "workroom.py").write_text(MODULE)
    (tmp_path / "workroom_with_an_iron.py").write_text("import iron_of_nowhere.steam")
    info = tmp_path / "workroom-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: workroom\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)

    def run(*arguments: object) -> CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "serving.commands", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_a_function_and_a_typer_app_become_commands_with_their_own_help(tailor) -> None:
    done = tailor("measure", "--width", 4)
    assert (done.returncode, done.stdout, done.stderr) == (0, "width 4\n", "")
    assert tailor("measure").returncode == 1
    assert tailor("stitch", "cuff").stdout == "stitched cuff\n"
    shown = tailor("stitch", "--help").stdout
    assert "Usage: tailor stitch" in shown and "Example: tailor stitch cuff" in shown


def test_help_lists_them_after_our_own_and_says_which_package_one_of_them_lacks(tailor) -> None:
    done = tailor("--help")
    lines = [line.split() for line in done.stdout.partition("Prepare:")[2].splitlines() if line.startswith("  ")]
    names = [words[0] for words in lines if words[0] in ("loadtest", "measure", "press", "serve", "stitch")]
    assert names == ["serve", "loadtest", "measure", "press", "stitch"]
    assert "Measure the cloth." in done.stdout and "iron_of_nowhere" in done.stdout
    assert done.returncode == 0


def test_a_command_whose_package_is_missing_names_it_in_one_line(tailor) -> None:
    done = tailor("press", "--steam", "collar")
    assert done.returncode == 1
    assert (
        done.stderr
        == "tailor: press needs the package iron_of_nowhere, which is not installed; install 'tailor[pipeline]'\n"
    )


def test_an_added_command_never_takes_the_name_of_one_of_ours(tailor) -> None:
    assert "Triton" in tailor("serve", "--help").stdout


def test_an_error_that_a_user_can_act_on_is_one_line_with_its_own_status_and_any_other_is_not_hidden(tailor) -> None:
    done = tailor("measure", "--width=-1")
    assert (done.returncode, done.stderr) == (2, "tailor: --width is -1; expected 0 or more\n")
    broken = tailor("measure", "--width", 13)
    assert "Traceback" in broken.stderr and "a fault of ours" in broken.stderr

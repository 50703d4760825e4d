"""`tailor --help` as a map of all commands, and the completion of a shell."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer

from serving.commands.app import app

TAILOR = [sys.executable, "-c", "import sys; from serving.commands import main; sys.exit(main())"]


def completed(line: str) -> list[str]:
    """What bash would offer after a line."""
    words = line.split(" ")
    asked = {"_TAILOR_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(TAILOR, env=os.environ | asked, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "offered"), [("tailor pred", "predict"), ("tailor predict --pri", "--prior"), ("tailor ini", "init")]
)
def test_a_shell_completes_commands_and_options(line: str, offered: str) -> None:
    assert completed(line) == [offered]


@pytest.mark.slow
def test_the_help_is_a_map_of_every_command_under_a_heading() -> None:
    text = subprocess.run([*TAILOR, "--help"], capture_output=True, text=True, check=True, timeout=60).stdout
    headings = [line.strip().rstrip(":") for line in text.splitlines() if line.rstrip().endswith(":")]
    assert headings == ["Options", "Prepare", "Serve", "Ask", "Look after it"]  # nothing is left for `More`
    assert "  predict " in text.partition("Ask:")[2]


def test_every_command_shows_an_example() -> None:
    program = typer.main.get_command(app)
    context = program.make_context("tailor", [], resilient_parsing=True)
    for name in program.list_commands(context):
        command = program.get_command(context, name)
        if not hasattr(command, "list_commands"):
            assert (command.epilog or "").startswith(f"Example: tailor {name}"), name

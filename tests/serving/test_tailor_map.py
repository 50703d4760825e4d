"""`tailor --help` as a map of all commands, and the completion of a shell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

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


def commands_of(group: Any, context: Any) -> Iterator[tuple[str, str]]:
    """Every command and group beneath a group: as it is typed, and what its --help prints."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        yield inner.command_path, command.get_help(inner)
        if hasattr(command, "list_commands"):
            yield from commands_of(command, inner)


def test_every_command_shows_an_example_those_of_a_group_too() -> None:
    program = typer.main.get_command(app)
    helps = dict(commands_of(program, program.make_context("tailor", [], resilient_parsing=True)))
    assert {"tailor serve", "tailor data", "tailor data check", "tailor data pack"} <= set(helps)
    for words, text in helps.items():
        assert re.search(rf"^\s*examples?:\s+{words}\b", text, re.MULTILINE | re.IGNORECASE), text
        assert re.search(rf"^\s*usage: {words} ", text, re.MULTILINE | re.IGNORECASE), text


def helps_of_groups(group: Any, context: Any) -> Iterator[tuple[str, str]]:
    """Each group with the map of its commands, as a terminal of 80 columns shows it."""
    yield context.command_path, group.get_help(context)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if hasattr(command, "list_commands"):
            yield from helps_of_groups(
                command, command.make_context(name, [], parent=context, resilient_parsing=True, terminal_width=80)
            )


def test_no_summary_of_a_command_is_cut_at_80_columns() -> None:
    program = typer.main.get_command(app)
    context = program.make_context("tailor", [], resilient_parsing=True, terminal_width=80)
    helps = dict(helps_of_groups(program, context))
    assert {"tailor", "tailor data"} <= set(helps)
    for words, text in helps.items():
        assert all(len(line) <= 80 for line in text.splitlines()), words
        cut = [line for line in text.splitlines() if line.endswith("...") and not line.startswith("Usage:")]
        assert cut == [], words


@pytest.mark.slow
@pytest.mark.parametrize("command", ["check", "pack"])
@pytest.mark.parametrize("program", ["tailor data", "python -m pipeline.data"])
def test_a_command_on_data_calls_itself_as_it_was_called(program: str, command: str) -> None:
    start = [*TAILOR, "data"] if program == "tailor data" else [sys.executable, "-m", "pipeline.data"]
    shown = subprocess.run([*start, command, "--help"], capture_output=True, text=True, check=True, timeout=60).stdout
    other = {"tailor data", "python -m pipeline.data"} - {program}
    assert shown.startswith(f"usage: {program} {command} ") and not any(words in shown for words in other)
    examples = shown.partition("examples:\n")[2].partition("\n\n")[0].splitlines()
    assert len(examples) == 3 and all(line.startswith(f"  {program} {command}") for line in examples)
    refused = subprocess.run([*start, command, "--jobs", "0"], capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode == 2 and f"\n{program} {command}: error: argument --jobs" in refused.stderr

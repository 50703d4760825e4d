"""`tailor --help` lists all commands; shell completion."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from pipeline.commands.app import app

TAILOR = [sys.executable, "-c", "import sys; from pipeline.commands.app import main; sys.exit(main())"]


def complete_in_bash(line: str) -> list[str]:
    """Return bash's completions of a line."""
    words = line.split(" ")
    variables = {"_TAILOR_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = subprocess.run(TAILOR, env=os.environ | variables, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "offered"), [("tailor pred", "predict"), ("tailor predict --pri", "--prior"), ("tailor ini", "init")]
)
def test_the_shell_completes_commands_and_options(line: str, offered: str) -> None:
    assert complete_in_bash(line) == [offered]


@pytest.mark.slow
def test_the_help_lists_every_command_under_a_heading() -> None:
    text = subprocess.run([*TAILOR, "--help"], capture_output=True, text=True, check=True, timeout=60).stdout
    headings = [line.strip().rstrip(":") for line in text.splitlines() if line.rstrip().endswith(":")]
    assert headings == ["Options", "Prepare", "Train", "Serve", "Send requests", "Operate"]
    assert "  predict " in text.partition("Send requests:")[2]
    program = typer.main.get_command(app)
    listed = {line.split()[0] for line in text.splitlines() if re.match(r"  [a-z]", line)}
    assert set(program.list_commands(program.make_context("tailor", [], resilient_parsing=True))) <= listed


def command_help(group: Any, context: Any) -> Iterator[tuple[str, str]]:
    """Yield every command and group below a group: the words to type, and its --help."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        yield inner.command_path, command.get_help(inner)
        if hasattr(command, "list_commands"):
            yield from command_help(command, inner)


def test_every_command_has_an_example_in_its_help() -> None:
    program = typer.main.get_command(app)
    helps = dict(command_help(program, program.make_context("tailor", [], resilient_parsing=True)))
    assert {"tailor serve", "tailor data", "tailor data check", "tailor data pack"} <= set(helps)
    for words, text in helps.items():
        assert re.search(rf"^\s*examples?:\s+{words}\b", text, re.MULTILINE | re.IGNORECASE), text
        assert re.search(rf"^\s*usage: {words} ", text, re.MULTILINE | re.IGNORECASE), text


def group_help(group: Any, context: Any) -> Iterator[tuple[str, str]]:
    """Return the help of each group for a terminal of 80 columns, of which the formatter uses 78."""
    yield context.command_path, group.get_help(context)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if hasattr(command, "list_commands"):
            yield from group_help(
                command, command.make_context(name, [], parent=context, resilient_parsing=True, terminal_width=78)
            )


def test_no_command_summary_is_truncated_at_80_columns() -> None:
    program = typer.main.get_command(app)
    context = program.make_context("tailor", [], resilient_parsing=True, terminal_width=78)
    helps = dict(group_help(program, context))
    assert {"tailor", "tailor data"} <= set(helps)
    for words, text in helps.items():
        assert all(len(line) <= 80 for line in text.splitlines()), words
        cut = [line for line in text.splitlines() if line.endswith("...") and not line.startswith("Usage:")]
        assert cut == [], words

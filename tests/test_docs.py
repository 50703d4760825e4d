"""The pages under docs/ and the README say what is so: they build, link, and name commands and messages that exist."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from serving.commands.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "recipes/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# Programs of others, whose options no test here looks up.
FOREIGN = {
    "docker",
    "kubectl",
    "torchrun",
    "nginx",
    "systemctl",
    "pip",
    "curl",
    "git",
    "ray",
    "prefect",
    "tensorboard",
    "cp",
    "export",
}
WIDE = {**os.environ, "COLUMNS": "200"}
RUN_BY_MODULE = re.compile(r"(pipeline|benchmarks|serving)\.\w+|pytest")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in a language."""
    return [text for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def commands(page: Path) -> list[str]:
    """The commands of a page: lines after `$ ` in console blocks, their continuation lines joined."""
    joined = "\n".join(blocks(page, "console")).replace("\\\n", " ")
    return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


EVERY_COMMAND = sorted({(page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in commands(page)})


@cache
def help_of(*command: str) -> str:
    """What `--help` prints: of a program in a process of its own, of a module of ours (`-m name …`) in this one."""
    if command[0] == "-m":
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
            importlib.import_module(command[1]).main([*command[2:], "--help"])
        return printed.getvalue()
    done = subprocess.run(
        [*command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True, env=WIDE
    )
    return done.stdout


def check_options(words: list[str], *command: str) -> None:
    """Every --option among the words is one that the command's own help names."""
    text = help_of(*command)
    for word in words:
        if word.startswith("-"):
            option = word.partition("=")[0]
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), f"{' '.join(command)} has no {option}"


def check_tailor(words: list[str]) -> None:
    """The command is one of `tailor`, and its help names every option."""
    program: Any = typer.main.get_command(app)
    context = program.make_context("tailor", [], resilient_parsing=True)
    name, *rest = words
    command: Any = program.get_command(context, name)
    assert command is not None, f"tailor has no command {name}"
    if name == "data":
        check_options(rest[1:], "-m", "pipeline.data", rest[0])
        return
    if isinstance(command, click.Group) or hasattr(command, "get_command"):
        context, (name, *rest) = command.make_context(name, [], parent=context, resilient_parsing=True), rest
        command = command.get_command(context, name)
        assert command is not None, f"tailor {words[0]} has no command {name}"
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        assert not word.startswith("--") or word.partition("=")[0] in known, f"tailor {words[0]} has no {word}"


@pytest.mark.parametrize(("page", "command"), EVERY_COMMAND)
def test_a_command_on_a_page_is_one_that_the_program_takes(page: str, command: str) -> None:
    words = shlex.split(command, comments=True)
    words = words[: next((place for place, word in enumerate(words) if word in ("|", "&", "&&", ">")), len(words))]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, *rest = words
    if program == "tailor":
        check_tailor(rest)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert all(word in targets for word in rest if "=" not in word)
    elif program == "dvc":
        name = rest[:2] if rest[0] in ("exp", "metrics", "plots", "remote", "config") else rest[:1]
        check_options(rest[len(name) :], "dvc", *name)
    elif program in ("python", "tailor-data"):
        if program == "python":
            assert rest[0] == "-m" and RUN_BY_MODULE.fullmatch(rest[1]), command
            module, *rest = rest[1:]
        else:
            module = "pipeline.data"
        if module == "pytest":
            assert all((ROOT / word).exists() for word in rest)
            return
        inner = rest[:1] if module == "pipeline.data" else []
        check_options(rest[len(inner) :], "-m", module, *inner)
    elif program == ".":
        assert rest == [".venv/bin/activate"]
    else:
        assert program in FOREIGN, f"{page}: {program} is neither Tailor's nor known; add a check"


def test_the_example_of_the_losses_runs_as_it_stands(tmp_path: Path) -> None:
    (example,) = blocks(ROOT / "docs/losses.md", "python")
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    subprocess.run(
        [sys.executable, script], cwd=ROOT, check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_program() -> None:
    files = [path for room in ("pipeline", "models", "serving") for path in (ROOT / room).rglob("*.py")]
    sources = "\n".join(path.read_text(encoding="utf-8") for path in files)
    words = re.sub(r"[\"']\s*\n\s*f?[\"']", "", sources)
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) > 8
    for message in messages:
        for part in re.split(r"…|'", message):
            if len(part.strip(" :;")) > 3:
                assert part.strip(" :;") in words, f"no message says {part!r}"


@pytest.mark.end_to_end
def test_the_site_builds_strictly_and_fetches_nothing_from_elsewhere(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        ["mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert {"index.html", "commands.html", "params.html", "models.html"} <= {page.name for page in pages}
    loaded = re.compile(r'<(?:script|img|iframe)[^>]+src="https?:|<link[^>]+rel="stylesheet"[^>]+href="https?:')
    for page in pages:
        assert not loaded.search(page.read_text(encoding="utf-8")), page


def test_each_failure_of_a_retraining_names_tests_that_there_are():
    page = (ROOT / "docs/retraining.md").read_text(encoding="utf-8").partition("## What happens when")[2]
    rows = [line.strip("| \n").split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    there = " ".join(name for path in (ROOT / "tests").rglob("test_*.py") for name in _tests_of(path))
    assert len(rows) > 20
    for what, *_, shown in rows:
        named = re.findall(r"`(\w+)(\[[^`]*\])?`", shown)
        missing = [name for name, _ in named if name not in there]
        assert missing == [] and (named or "the same tests" in shown), f"{what}: {missing}"


def _tests_of(path: Path) -> list[str]:
    return re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)

"""Find the commands in the README and docs/, and check that the named programs accept them."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import typer

from pipeline.commands.app import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md")]
# Hand-written pages; the lists of modules are generated.
PAGES += sorted(page for page in (ROOT / "docs").rglob("*.md") if not page.name.startswith("modules-"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:tailor|dvc|make|python -m|promtool|pytest) [^`\n]+)`")
# Languages of blocks without commands; every other block has commands.
NO_COMMANDS = {"text", "yaml", "json", "python", "mermaid"}
# External programs whose options are not checked.
FOREIGN = {
    "docker",
    "kubectl",
    "nginx",
    "systemctl",
    "pip",
    "curl",
    "git",
    "cd",
    "tensorboard",
    "python3",
    "promtool",
    "mkdir",
    "gpu_pack.sh",
}
WIDE = {**os.environ, "COLUMNS": "200"}
RUN_BY_MODULE = re.compile(r"(pipeline|benchmarks|serving)(\.\w+)+|pytest")


def name_of(page: Path) -> str:
    """Return a page's name in the tests: its path relative to the root."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a page in a language."""
    return [text for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


def commands(page: Path) -> list[str]:
    """Return the commands of a page: lines after `$ ` in console blocks, continuation lines joined, no comments."""
    return [command for block in blocks(page, "console") for command in commands_in(block)]


def commands_in(block: str) -> list[str]:
    """Return the commands of one console block."""
    lines = [line[2:] for line in block.replace("\\\n", " ").splitlines() if line.startswith("$ ")]
    return [" ".join(re.sub(r"\s+#\s.*", "", line).split()) for line in lines]


def steps(page: Path) -> list[tuple[str, str]]:
    """Return the steps of a page in order: ("console", a command) and ("python", a program)."""
    found = []
    for kind, block in FENCE.findall(page.read_text(encoding="utf-8")):
        if kind in ("console", "python"):
            found += [(kind, text) for text in (commands_in(block) if kind == "console" else [block])]
    return found


def spoken_of(page: Path) -> list[str]:
    """Return the commands with arguments in a page's text and tables."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [found for found in INLINE.findall(text) if not re.search(r"[A-Z]{4,}$|FILE|FOLDER|…", found)]


@cache
def help_of(*command: str) -> str:
    """Return the output of `--help`: of a program in a subprocess, of Tailor's modules (`-m name …`) in-process."""
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
    """Check that the command's help lists every --option among the words."""
    if not any(word.startswith("-") for word in words) and command[0] != "-m":
        return
    text = help_of(*command)
    for word in words:
        if word.startswith("-"):
            option = word.partition("=")[0]
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", text), f"{' '.join(command)} has no {option}"


def check_tailor(words: list[str]) -> None:
    """Check that the command is one of `tailor`, and that its help lists every option."""
    program: Any = typer.main.get_command(app)
    context = program.make_context("tailor", [], resilient_parsing=True)
    name, *arguments = words
    command: Any = program.get_command(context, name)
    assert command is not None, f"tailor has no command {name}"
    alone = getattr(command, "invoke_without_command", False) and (not arguments or arguments[0].startswith("--"))
    if not alone and (isinstance(command, click.Group) or hasattr(command, "get_command")):
        context, (name, *arguments) = command.make_context(name, [], parent=context, resilient_parsing=True), arguments
        command = command.get_command(context, name)
        assert command is not None, f"tailor {words[0]} has no command {name}"
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in arguments:
        assert not word.startswith("--") or word.partition("=")[0] in options, f"tailor {words[0]} has no {word}"


def check_command(command: str) -> None:
    """Check a command without running it: its program, module or make target exists and has the options."""
    words = shlex.split(command, comments=True)
    words = words[: next((place for place, word in enumerate(words) if word in ("|", "&", "&&", ">")), len(words))]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        if name == "TAILOR_LAUNCH":
            check_command(f"{value} -m pipeline.student")
    program, *arguments = words
    if program == "tailor":
        check_tailor(arguments)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert all(word in targets for word in arguments if "=" not in word), command
    elif program == "dvc":
        name = arguments[:2] if arguments[0] in ("exp", "metrics", "plots", "remote", "config") else arguments[:1]
        check_options(arguments[len(name) :], "dvc", *name)
    elif program == "torchrun":
        check_torchrun(arguments)
    elif program == "pytest":
        assert (ROOT / arguments[0]).exists(), command
    elif program == "python" or program.endswith("/bin/python"):
        check_python(arguments, command)
    elif program == ".":
        assert arguments == [".venv/bin/activate"]
    else:
        assert Path(program).name in FOREIGN, f"{program} is neither Tailor's nor known; add a check"


def check_torchrun(words: list[str]) -> None:
    """Check that torchrun's parser accepts the words, and that the module to start can be imported."""
    from torch.distributed.run import get_args_parser

    options = get_args_parser().parse_args([re.sub(r"^\$\w+$", "0", word) for word in words])
    assert options.module and importlib.util.find_spec(options.training_script)


def check_python(words: list[str], command: str) -> None:
    """Check that the module exists and its help lists the options; for pytest, that the files exist."""
    assert words[0] == "-m" and RUN_BY_MODULE.fullmatch(words[1]), command
    module, *words = words[1:]
    if module == "pytest":
        assert all((ROOT / word).exists() for word in words)
        return
    assert importlib.util.find_spec(module), command
    if words:  # some take no options, not even --help
        check_options(words, "-m", module)

"""The pages under docs/ and the README say what is so: they build, link, and name commands and messages that exist.

The commands themselves are run by tests/end_to_end/test_documented_commands.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documented import FENCE, NO_COMMANDS, PAGES, ROOT, blocks, check_command, commands, name_of, spoken_of

SPOKEN_OF = sorted({(name_of(page), command) for page in PAGES for command in spoken_of(page)})


@pytest.mark.parametrize(("page", "command"), SPOKEN_OF)
def test_a_command_in_the_text_of_a_page_is_one_that_the_program_takes(page: str, command: str) -> None:
    assert command.isprintable(), page
    check_command(command)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_of_commands_is_one_that_the_tests_read(page: Path) -> None:
    kinds = {kind for kind, _ in FENCE.findall(page.read_text(encoding="utf-8"))} - NO_COMMANDS
    assert kinds <= {"console"}, f"{page}: write commands as ```console blocks, each after a dollar"
    assert commands(page) or "console" not in kinds


@pytest.mark.slow
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

"""Checks of docs/ and the README: the site builds, links resolve, and named commands and messages exist.

The commands themselves are run by tests/end_to_end/documentation.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documented import (
    FENCE,
    NO_COMMANDS,
    PAGES,
    ROOT,
    blocks,
    check_command,
    commands,
    name_of,
    spoken_of,
)

PAGES_SCRIPT = ROOT / "docs/reference/pages.py"
LOGS = {"results", "experiments"}  # records of runs, not task pages
LEVELS = """
[[tool.importlinter.contracts]]
name = "levels of the pipeline"
type = "layers"
containers = ["pipeline"]
layers = ["commands", "evaluate | (export)", "shared"]
"""
NAMED_COMMANDS = sorted({(name_of(page), command) for page in PAGES for command in spoken_of(page)})


@pytest.mark.parametrize(("page", "command"), NAMED_COMMANDS)
def test_a_command_in_the_text_of_a_page_is_valid(page: str, command: str) -> None:
    assert command.isprintable(), page
    check_command(command)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_of_commands_is_a_console_block(page: Path) -> None:
    kinds = {kind for kind, _ in FENCE.findall(page.read_text(encoding="utf-8"))} - NO_COMMANDS
    assert kinds <= {"console"}, f"{page}: write commands as ```console blocks, each after a dollar"
    assert commands(page) or "console" not in kinds


@pytest.mark.slow
@pytest.mark.parametrize("page", ["losses.md", "contrast-terms.md"])
def test_the_examples_of_the_losses_run(page: str, tmp_path: Path) -> None:
    example = "\n".join(blocks(ROOT / "docs" / page, "python"))
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    subprocess.run(
        [sys.executable, script], cwd=ROOT, check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


def test_the_messages_of_the_troubleshooting_page_exist() -> None:
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


def test_the_navigation_names_each_page_once() -> None:
    named = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    written = [page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(named) == sorted([*written, "reference/commands.md", "reference/params.md"])


@pytest.mark.end_to_end
def test_the_site_builds_strictly_has_its_images_and_loads_no_external_resource(tmp_path: Path) -> None:
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    for command in (
        [sys.executable, ROOT / "docs/reference/generated.py", tmp_path / "build/docs"],
        ["zensical", "build", "--strict", "--config-file", tmp_path / "mkdocs.yml"],
    ):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, env=environment
        )
        assert done.returncode == 0, done.stdout + done.stderr
    pages = [page for page in (tmp_path / "build/site").rglob("*.html") if page.name != "404.html"]
    assert {"index.html", "commands.html", "params.html", "models.html"} <= {page.name for page in pages}
    external = re.compile(r'<(?:script|img|iframe)[^>]+src="https?:|<link[^>]+rel="stylesheet"[^>]+href="https?:')
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert not external.search(text), page
        images = re.findall(r'<img[^>]+src="([^"]+)"', text)
        assert [name for name in images if not (page.parent / name).is_file()] == [], page


def test_each_fault_of_the_page_has_a_test_and_each_marked_test_a_fault():
    page = (ROOT / "docs/retraining-faults.md").read_text(encoding="utf-8")
    faults = re.findall(r"^\| `([\w-]+)` \|", page, re.MULTILINE)
    assert len(faults) == len(set(faults)) > 20
    assert sorted(re.findall(r"^- \*\*([\w-]+)\*\*:", page, re.MULTILINE)) == sorted(faults)


def test_the_generated_pages_are_up_to_date():
    done = subprocess.run(
        [sys.executable, PAGES_SCRIPT, "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_generated_pages_are_stale_after_a_new_module_a_renamed_test_or_other_levels(tmp_path: Path) -> None:
    specification = importlib.util.spec_from_file_location("pages", PAGES_SCRIPT)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    for room in ("models", "pipeline", "serving", "tailor", "docs"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__", "recipes"))
    (tmp_path / "tests").mkdir()
    (tmp_path / "pyproject.toml").write_text(LEVELS, encoding="utf-8")
    test = tmp_path / "tests/test_faults.py"
    test.write_text('@pytest.mark.fault_case("stage-hangs")\ndef test_one(): pass\n', encoding="utf-8")
    for name, text in script.pages(tmp_path).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert script.stale(tmp_path) == []
    (tmp_path / "models/new.py").write_text('"""A new module."""\n', encoding="utf-8")
    test.write_text('@pytest.mark.fault_case("stage-hangs")\ndef test_two(): pass\n', encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(LEVELS.replace("commands", "verbs"), encoding="utf-8")
    stale = {"docs/architecture.md", "docs/retraining-faults.md", "docs/reference/modules-models.md"}
    assert set(script.stale(tmp_path)) == stale
    pages = script.pages(tmp_path)
    assert "`new.py`: A new module." in pages["docs/reference/modules-models.md"]
    assert "**stage-hangs**: `tests/test_faults.py::test_two`" in pages["docs/retraining-faults.md"]
    levels = ['level0["verbs"]', 'level1["evaluate, export"]', 'level2["shared"]', "level0 --> level1 --> level2"]
    assert "\n    ".join(levels) in pages["docs/architecture.md"]


def test_the_pages_are_short_and_listed_on_the_first_page() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(readme.encode()) <= 8192 and readme.count("\n") <= 130
    assert (ROOT / "docs/images/long_tail.svg").stat().st_size < 60_000
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert text.count("\n") <= 200, page.name
        assert page.name == "index.md" or f"]({page.name})" in index, page.name
        assert page.stem in LOGS or "After this page you " in text.partition("\n## ")[0], page.name


def test_the_readme_lists_every_package() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Packages")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`((?:models|pipeline|serving|tailor)/[\w/]*)`", readme))
    folders = {
        path.parent
        for room in ("models", "pipeline", "serving", "tailor")
        for path in (ROOT / room).rglob("__init__.py")
    }
    assert listed == {f"{folder.relative_to(ROOT).as_posix()}/" for folder in folders}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_is_in_plain_words(page: Path) -> None:
    words = "anew|whoever|nobody|somebody|goes on|went on|to the bit|is told"
    assert re.findall(rf"\b({words})\b", page.read_text(encoding="utf-8"), re.IGNORECASE) == []

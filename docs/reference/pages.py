"""Write the pages that are generated from the source: docs/architecture.md, the lists of modules and of fault tests.

`python docs/reference/pages.py` writes them, `--check` only compares, and exits with status 1 if a page is out of date.
Sources are docstrings, imports, the `layers` contracts of pyproject.toml and the marker `fault_case` of tests. No module of
Tailor is imported.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
ROOMS = ("models", "pipeline", "serving", "tailor")
COMMAND = "python docs/reference/pages.py"
NOTE = f"<!-- Written by `{COMMAND}`; do not edit. -->"
FAULTS_PAGE = "docs/retraining-faults.md"
FAULTS_BLOCK = re.compile(r"(?<=<!-- tests -->\n).*?(?=<!-- /tests -->)", re.DOTALL)


def pages(root: Path = ROOT) -> dict[str, str]:
    """Every generated page: its path, relative to the root, and its content."""
    faults = FAULTS_BLOCK.sub(lambda _: fault_list(root), (root / FAULTS_PAGE).read_text(encoding="utf-8"))
    content = {f"docs/reference/modules-{room}.md": modules(root, room) for room in ROOMS}
    return {"docs/architecture.md": architecture(root), FAULTS_PAGE: faults, **content}


def architecture(root: Path) -> str:
    """Landmarks, packages, imports, levels and rules, one line each."""
    lines = [NOTE, "# Architecture", ""]
    lines += ["After this page you can find the module for a task, and name the packages that it may import.", ""]
    lines += table("you look for", "module", [(task, f"`{path}`: `{name}`") for task, path, name in landmarks(root)])
    lines += ["## Packages", "", "One line each, from the docstring. The link leads to the list of modules.", ""]
    for room in ROOMS:
        lines += [f"**[`{room}/`](reference/modules-{room}.md)**: {summary(root / room / '__init__.py')}", ""]
        inner = [folder for folder in packages(root / room) if folder != root / room]
        rows = [(f"`{folder.relative_to(root)}/`", summary(folder / "__init__.py")) for folder in inner]
        lines += table("package", "what it does", rows) if rows else []
    lines += ["## Imports between models, pipeline and serving", ""]
    lines += diagram("LR", [f"{one} --> {other}" for one, other in sorted(room_imports(root))])
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    for title, levels in (level for contract in contracts for level in levels_of(contract)):
        boxes = [f'level{number}["{", ".join(names)}"]' for number, names in enumerate(levels)]
        arrows = " --> ".join(f"level{number}" for number in range(len(levels)))
        lines += [f"## Levels: {title}", "", "A package imports only packages on lower levels.", ""]
        lines += diagram("TD", [*boxes, arrows])
    lines += ["## Rules", "", "`make lint` checks these contracts of `pyproject.toml`:", ""]
    lines += [f"- {contract['name']}" for contract in contracts]
    return "\n".join([*lines, ""])


def table(first: str, second: str, rows: list[tuple[str, str]]) -> list[str]:
    """The lines of a table of two columns."""
    cells = [(one.replace("|", "\\|"), other.replace("|", "\\|")) for one, other in rows]
    return [f"| {first} | {second} |", "|---|---|", *(f"| {one} | {other} |" for one, other in cells), ""]


def diagram(direction: str, lines: list[str]) -> list[str]:
    """The lines of a Mermaid flowchart."""
    return ["```mermaid", f"flowchart {direction}", *(f"    {line}" for line in lines), "```", ""]


# What a new developer searches for, and the function or class that does it.
LANDMARKS = {
    "where the prior is added to the logits": "adjust_logits",
    "how an image becomes the network's input": "preprocess",
    "where training normalises pixels": "Normalisation",
    "where the exported graph normalises pixels": "ServedStudent",
    "where the server reads a request": "RequestParser",
    "what decides a promotion": "decide",
    "how a server is started and stopped": "TritonServer",
}


def landmarks(root: Path) -> Iterator[tuple[str, str, str]]:
    """Each task of LANDMARKS with the module that defines the name, and the name. Raises ValueError if it is not unique."""
    for task, name in LANDMARKS.items():
        found = [
            path.relative_to(root).as_posix()
            for room in ROOMS
            for path in sorted((root / room).rglob("*.py"))
            if re.search(rf"^(?:def|class) {name}\b", path.read_text(encoding="utf-8"), re.MULTILINE)
        ]
        if len(found) != 1:
            raise ValueError(f"{name} of LANDMARKS is defined in {found or 'no module'}, expected one module")
        yield task, found[0], name


def modules(root: Path, room: str) -> str:
    """Every module of a top-level package below its folder, one line each, from their docstrings."""
    lines = [NOTE, f"# Modules of {room}", "", "After this page you can find a module by what it does.", ""]
    for folder in packages(root / room):
        lines.append(f"- **`{folder.relative_to(root)}/`**: {summary(folder / '__init__.py')}")
        names = sorted(path for path in folder.glob("*.py") if not path.name.startswith("__"))
        lines += [f"    - `{path.name}`: {summary(path)}" for path in names]
        if others := ", ".join(f"`{name}`" for name in other_files(folder)):
            lines.append(f"    - other files: {others}")
    return "\n".join([*lines, ""])


def packages(folder: Path) -> list[Path]:
    """A package and the packages below it, in the order of their names."""
    return sorted(path.parent for path in folder.rglob("__init__.py"))


def other_files(package: Path) -> list[str]:
    """Names of a package's entries that are no modules or packages; folders end with a slash."""
    names = []
    for path in sorted(package.iterdir()):
        if path.is_dir() and not path.name.startswith(("_", ".")) and not (path / "__init__.py").exists():
            names.append(f"{path.name}/")
        elif path.is_file() and path.suffix not in (".py", ".pyc", ".typed"):
            names.append(path.name)
    return names


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def summary(path: Path) -> str:
    """The first line of a module's docstring, with no HTML in it."""
    text = ast.get_docstring(tree(path))
    if not text:
        raise ValueError(f"{path} has no docstring; docs/architecture.md shows its first line")
    return text.splitlines()[0].replace("<", "&lt;")


def room_imports(root: Path) -> set[tuple[str, str]]:
    """Pairs of top-level packages of which the first imports the second."""
    imports = re.compile(rf"^ *(?:from|import) ({'|'.join(ROOMS)})\b", re.MULTILINE)
    paths = [(room, path) for room in ROOMS for path in (root / room).rglob("*.py")]
    found = {(room, other) for room, path in paths for other in imports.findall(path.read_text(encoding="utf-8"))}
    return {(room, other) for room, other in found if room != other}


def levels_of(contract: dict[str, Any]) -> Iterator[tuple[str, list[list[str]]]]:
    """The levels of a `layers` contract, top first, for each of its containers."""
    if contract["type"] != "layers":
        return
    levels = [[name.strip(" ()") for name in re.split(r"[|:]", layer)] for layer in contract["layers"]]
    for container in contract.get("containers") or [contract["name"]]:
        yield container, levels


def fault_list(root: Path) -> str:
    """The tests of each fault of the page, from their marker `fault_case`."""
    tests: dict[str, list[str]] = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        if "fault_case" in path.read_text(encoding="utf-8"):
            functions = [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]
            for function in functions:
                for fault in marked(function.decorator_list):
                    tests.setdefault(fault, []).append(f"`{path.relative_to(root)}::{function.name}`")
    return "".join(f"- **{fault}**: {', '.join(tests[fault])}\n" for fault in sorted(tests))


def marked(decorators: Iterable[ast.expr]) -> list[str]:
    """The faults of the markers `fault_case` among a test's decorators, including those of its parameters."""
    calls = [node for one in decorators for node in ast.walk(one) if isinstance(node, ast.Call)]
    calls = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "fault_case"]
    found = [argument.value for call in calls for argument in call.args if isinstance(argument, ast.Constant)]
    return list(dict.fromkeys(found))


def stale(root: Path = ROOT) -> list[str]:
    """The generated pages that differ from the current source."""
    written = pages(root)
    current = {name: (root / name).read_text(encoding="utf-8") for name in written if (root / name).is_file()}
    return [name for name, text in written.items() if current.get(name) != text]


def main(arguments: list[str]) -> None:
    if arguments not in ([], ["--check"]):
        sys.exit(f"{' '.join(arguments)}: the only argument is --check")
    if arguments and (names := stale()):
        sys.exit(f"out of date: {', '.join(names)}; run `{COMMAND}`")
    if not arguments:
        for name, text in pages().items():
            (ROOT / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

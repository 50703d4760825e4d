"""`python -m pipeline.shared.fingerprint`: for each stage, a file with the hash of every source file that the stage can run.

The dvc.yaml of a user's project has no source files to depend on: Tailor is an installed package there. Its first stage
writes these files, and every other stage depends on its own one, so that after an upgrade `dvc repro` runs what it must.
What a stage can run is computed from its imports. Comments and docstrings are left out of the hashes.
"""

from __future__ import annotations

import hashlib
import io
import sys
import tokenize
from functools import cache
from modulefinder import ModuleFinder
from pathlib import Path
from typing import Any

from pipeline.shared.artifacts import write_file
from serving.shared.terminal import print

ROOT = Path(__file__).parents[2]  # the folder that holds the packages
PACKAGES = ("models", "pipeline", "serving")
STAGES = ("split", "prior", "teacher", "student", "evaluate", "export", "seeds")
FOLDER = Path(".tailor/code")
DIGITS = 16  # of a sha256 in a file that people may read


class _Imports(ModuleFinder):
    """The imports of Tailor's modules within Tailor's packages, wherever in a module they stand."""

    def import_hook(self, name: str, caller: Any = None, fromlist: Any = None, level: int = -1) -> Any:
        """Follow one import statement; those of other packages are passed over."""
        if level <= 0 and name.partition(".")[0] not in PACKAGES:
            return None
        return super().import_hook(name, caller, fromlist, level)


def _is_package(path: Path) -> bool:
    return (path / "__init__.py").is_file()


@cache
def source_files(stage: str) -> tuple[Path, ...]:
    """The files that a stage can run or read, absolute and sorted: the modules that it imports, directly or through others,
    and the files and folders beside them, or beside their package, that they name in a string: templates, Triton's models.
    """
    imports = _Imports(path=[str(ROOT)])
    imports.import_hook(f"pipeline.{stage}")
    found = {Path(module.__file__) for module in imports.modules.values() if module.__file__}
    pending = list(found)
    while pending:
        path = pending.pop()
        text = path.read_text(encoding="utf-8")
        beside = [entry for entry in path.parent.iterdir() if entry.suffix != ".py" and not _is_package(entry)]
        named = [entry for entry in beside if f'"{entry.name}"' in text]
        named += [entry for entry in path.parents[1].iterdir() if f'.parents[1] / "{entry.name}"' in text]
        files = {file for entry in named for file in (entry.rglob("*") if entry.is_dir() else [entry])}
        files = {file for file in files if file.is_file() and file.suffix != ".pyc"} - found
        found |= files
        pending += [file for file in files if file.parent == path.parent]
    return tuple(sorted(found))


def fingerprint(stage: str) -> str:
    """A line for each source file of a stage: its hash and its path."""
    lines = [f"{_hash(path)[:DIGITS]}  {path.relative_to(ROOT).as_posix()}\n" for path in source_files(stage)]
    return "".join(lines)


def code_sha256() -> str:
    """sha256 over the source files of all stages: equal for equal code, whatever version it calls itself."""
    return hashlib.sha256("".join(map(fingerprint, STAGES)).encode()).hexdigest()


@cache
def _hash(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".py":
        data = _without_comments(data.decode()).encode()
    return hashlib.sha256(data).hexdigest()


def _without_comments(text: str) -> str:
    """A module's text without comments, docstrings, blank lines, and blanks at the end of a line."""
    lines = text.split("\n")
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type != tokenize.NL]
    starts = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT}
    for position in range(len(tokens) - 1, -1, -1):  # from the end: what is cut moves nothing that comes before it
        token = tokens[position]
        alone = position == 0 or tokens[position - 1].type in starts
        ends = position + 1 < len(tokens) and tokens[position + 1].type == tokenize.NEWLINE
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and alone and ends):
            (first, left), (last, right) = token.start, token.end
            lines[first - 1 : last] = [lines[first - 1][:left] + lines[last - 1][right:]]
    return "\n".join(filter(None, map(str.rstrip, lines)))


def main() -> int:
    """Write the file of each stage; returns the exit code."""
    for stage in STAGES:
        write_file(FOLDER / stage, fingerprint(stage))
    print(f"fingerprint: code {code_sha256()[:DIGITS]} → {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

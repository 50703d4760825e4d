"""`python -m pipeline.shared.fingerprint`: write, for each stage, the hashes of the source files that it can run.

In a user's project Tailor is an installed package, so dvc.yaml has no source files as dependencies. Its first stage
writes these files and each other stage depends on its file, so that after an upgrade `dvc repro` runs the affected
stages. The files that a stage can run are computed from its imports. Comments and docstrings do not count in the
hashes.
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
STAGES = ("split", "prior", "embed", "embed_text", "teacher", "student", "classifier", "evaluate", "export", "seeds")
FOLDER = Path(".tailor/code")
VERSION_FILE = "serving/shared/version.py"  # not hashed, because a new version number alone must not run a stage again
DIGITS = 16  # leading digits of a sha256 in the files


class _Imports(ModuleFinder):
    """Finds the imports of Tailor's modules within Tailor's packages, at any place in a module."""

    def import_hook(self, name: str, caller: Any = None, fromlist: Any = None, level: int = -1) -> Any:
        """Follow one import statement; imports of other packages are ignored."""
        if level <= 0 and name.partition(".")[0] not in PACKAGES:
            return None
        return super().import_hook(name, caller, fromlist, level)


@cache
def source_files(stage: str, root: Path = ROOT) -> tuple[Path, ...]:
    """Absolute, sorted paths of the files that a stage can run or read.

    These are the modules that it imports, directly or indirectly, and the files and folders beside a module, or beside
    its package, that the module names in a string, such as templates and Triton's models. VERSION_FILE is left out.
    """
    imports = _Imports(path=[str(root)])
    imports.import_hook(f"pipeline.{stage}")
    sources = {Path(module.__file__) for module in imports.modules.values() if module.__file__} - {root / VERSION_FILE}
    pending = list(sources)
    while pending:
        path = pending.pop()
        text = path.read_text(encoding="utf-8")
        beside = [
            entry for entry in path.parent.iterdir() if entry.suffix != ".py" and not (entry / "__init__.py").is_file()
        ]
        read = [entry for entry in beside if f'"{entry.name}"' in text]
        read += [entry for entry in path.parents[1].iterdir() if f'.parents[1] / "{entry.name}"' in text]
        files = {file for entry in read for file in (entry.rglob("*") if entry.is_dir() else [entry])}
        files = {file for file in files if file.is_file() and file.suffix != ".pyc"} - sources
        sources |= files
        pending += [file for file in files if file.parent == path.parent]
    return tuple(sorted(sources))


def fingerprint(stage: str, root: Path = ROOT) -> str:
    """Text with one line for each source file of a stage: its hash and its path."""
    files = source_files(stage, root)
    return "".join(f"{_hash(path)[:DIGITS]}  {path.relative_to(root).as_posix()}\n" for path in files)


def code_sha256(root: Path = ROOT) -> str:
    """sha256 over the source files of all stages: equal for equal code, independent of the version number."""
    return hashlib.sha256("".join(fingerprint(stage, root) for stage in STAGES).encode()).hexdigest()


def sha256_of_sources(*patterns: str, root: Path = ROOT) -> str:
    """Hash source files (sha256) without comments and docstrings. patterns: relative to the folder of the packages."""
    files = [file for pattern in patterns for file in sorted(root.glob(pattern))]
    return hashlib.sha256("".join(map(_hash, files)).encode()).hexdigest()


@cache
def _hash(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix == ".py":
        data = strip_comments(data.decode()).encode()
    return hashlib.sha256(data).hexdigest()


def strip_comments(text: str) -> str:
    """Text of a module without comments, docstrings, blank lines and trailing spaces."""
    lines = text.split("\n")
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type != tokenize.NL]
    starts = {tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT}
    for position in range(len(tokens) - 1, -1, -1):  # backwards, so that a removal does not move earlier tokens
        token = tokens[position]
        is_statement = position == 0 or tokens[position - 1].type in starts
        ends = position + 1 < len(tokens) and tokens[position + 1].type == tokenize.NEWLINE
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and is_statement and ends):
            (first, start), (last, end) = token.start, token.end
            lines[first - 1 : last] = [lines[first - 1][:start] + lines[last - 1][end:]]
    return "\n".join(filter(None, map(str.rstrip, lines)))


def main() -> int:
    """Write the file of each stage; returns the exit code."""
    for stage in STAGES:
        write_file(FOLDER / stage, fingerprint(stage))
    print(f"fingerprint: code {code_sha256()[:DIGITS]} → {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

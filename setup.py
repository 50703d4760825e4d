"""Build the wheel: add the git commit, and a copy of each module that tailor.client and tailor.losses import.

A program that installs Tailor may have top-level modules `models` and `serving`, which Python would import instead. In
the wheel the copies import one another as `tailor._models` and `tailor._serving`. All other metadata is in
pyproject.toml.
"""

import ast
import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
ROOMS = ("models", "serving")
VERSION_FILE = "serving/shared/version.py"


def imports_of(source: str) -> list[ast.Import | ast.ImportFrom]:
    """The imports of a module from the packages in ROOMS."""
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    return [node for node in found if names_of(node)[0].partition(".")[0] in ROOMS]


def names_of(node: ast.Import | ast.ImportFrom) -> list[str]:
    """Names that an import can load: modules, and names that may be modules."""
    names = [alias.name for alias in node.names]
    if isinstance(node, ast.Import):
        return names
    return [node.module or "", *(f"{node.module}.{name}" for name in names)]


def files_of(name: str) -> list[Path]:
    """The file of a module, if `name` is one, and the __init__.py of its packages; relative to the root."""
    parts = name.split(".")
    packages = [Path(*parts[:depth], "__init__.py") for depth in range(1, len(parts) + 1)]
    return [path for path in (*packages, Path(*parts).with_suffix(".py")) if (ROOT / path).is_file()]


def renamed(source: str) -> str:
    """Source of a module with `from models.x import y` replaced by `from tailor._models.x import y`; the same for serving."""
    lines = source.splitlines(keepends=True)
    for node in imports_of(source):
        if isinstance(node, ast.Import):
            raise SystemExit(
                f"setup.py: write {ast.unparse(node)!r} as `from ... import ...`; the wheel renames only those"
            )
        index = node.lineno - 1
        lines[index] = lines[index].replace(f"from {node.module}", f"from tailor._{node.module}", 1)
    return "".join(lines)


class BuildPy(build_py):
    """build_py that also copies the modules into `tailor`; an editable install uses the original packages and git."""

    def run(self) -> None:
        """Build the packages, record the commit and copy the modules."""
        super().run()
        if self.editable_mode:
            return
        version = runpy.run_path(str(ROOT / VERSION_FILE))
        Path(self.build_lib, VERSION_FILE).with_name("commit.txt").write_text(version["source_commit"]() + "\n")
        pending = [Path("tailor/client.py"), Path("tailor/losses.py")]
        done: set[Path] = set()
        while pending:
            path = pending.pop()
            if path in done:
                continue
            done.add(path)
            source = (ROOT / path).read_text(encoding="utf-8")
            pending += [file for node in imports_of(source) for name in names_of(node) for file in files_of(name)]
            room, *rest = path.parts
            target = Path(self.build_lib, *(("tailor", f"_{room}") if room in ROOMS else (room,)), *rest)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(renamed(source), encoding="utf-8")


setup(cmdclass={"build_py": BuildPy})

"""Code fingerprint of a stage: import closure against grimp's import graph, and changes that affect the hash."""

from __future__ import annotations

from pathlib import Path

import grimp
import pytest

from pipeline.shared.fingerprint import PACKAGES, STAGES, VERSION_FILE, code_sha256, source_files, strip_comments
from tests.support.making import ROOT

pytestmark = pytest.mark.slow


def names(stage: str) -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in source_files(stage)}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph(*PACKAGES, cache_dir=None)  # grimp's cache missed files changed by a merge


@pytest.mark.parametrize("stage", STAGES)
def test_every_module_that_a_stage_imports_is_hashed(stage: str, graph: grimp.ImportGraph) -> None:
    modules, pending = set(), {f"pipeline.{stage}"}
    while pending:  # importing a module also runs its parent packages and their imports
        modules |= pending
        around = {module.rpartition(".")[0] for module in pending if "." in module}
        pending = around.union(*map(graph.find_upstream_modules, pending)) - modules
    paths = {module.replace(".", "/") for module in modules}
    expected = {f"{path}/__init__.py" if (ROOT / path).is_dir() else f"{path}.py" for path in paths}
    hashed = {name for name in names(stage) if name.endswith(".py") and not name.startswith("serving/triton/")}
    assert hashed == expected - {VERSION_FILE}


def test_files_that_a_module_reads_are_hashed() -> None:
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pipeline/report").glob("*.jinja")}
    of_commands = {"pipeline/report/labels.html.jinja", "pipeline/report/methods.html.jinja"}
    assert templates - of_commands < names("evaluate") and "pipeline/report/page.js" in names("evaluate")
    assert {"serving/triton/classifier_model.py", "serving/triton/network.py"} < names("export")
    for stage in ("split", "prior", "embed", "teacher", "student"):
        assert {name for name in names(stage) if not name.endswith(".py") or "triton" in name} == set()


def test_comments_and_docstrings_are_not_hashed() -> None:
    text = '"""Doc."""\nX = "# text"  # why\n\nclass A:\n    """Doc\n    of two lines."""\n    y: int = 1\n    """Its y."""\n'
    assert strip_comments(text) == 'X = "# text"\nclass A:\n    y: int = 1'
    assert strip_comments('def f():\n    return """a\n\n# b"""\n') == 'def f():\n    return """a\n# b"""'


def test_another_version_number_runs_no_stage_again() -> None:
    assert (ROOT / VERSION_FILE).is_file()
    for stage in STAGES:
        assert VERSION_FILE not in names(stage)


def write_code(root: Path, prior: str) -> Path:
    """Write a tree with all stages, which import models/prior.py; `prior` is its text."""
    for name in PACKAGES:
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text("")
    for stage in STAGES:
        (root / f"pipeline/{stage}.py").write_text("from models import prior\n")
    (root / "models/prior.py").write_text(prior)
    return root


def test_the_hash_of_the_code_changes_only_with_code_that_a_stage_imports(tmp_path: Path) -> None:
    original = code_sha256(write_code(tmp_path / "original", "X = 1\n"))
    documented = write_code(tmp_path / "documented", '"""What it is."""\nX = 1  # one\n')
    (documented / "models/other.py").write_text("Y = 1\n")  # no stage imports it
    assert code_sha256(documented) == original
    assert code_sha256(write_code(tmp_path / "changed", "X = 2\n")) != original

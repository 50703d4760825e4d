"""Code fingerprint of a stage: import closure against grimp's import graph, and changes that affect the hash."""

from __future__ import annotations

from pathlib import Path

import grimp
import pytest

from pipeline.shared import fingerprint
from pipeline.shared.fingerprint import PACKAGES, STAGES, _without_comments, code_sha256, source_files
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
    assert hashed == expected


def test_files_that_a_module_reads_are_hashed_with_it() -> None:
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "pipeline/report").glob("*.jinja")}
    assert templates < names("evaluate") and "pipeline/report/page.js" in names("evaluate")
    assert {"serving/triton/classifier_model.py", "serving/triton/network.py"} < names("export")
    for stage in ("split", "prior", "embed", "teacher", "student"):
        assert {name for name in names(stage) if not name.endswith(".py") or "triton" in name} == set()


def test_the_hash_of_a_module_is_of_what_it_does() -> None:
    text = '"""Doc."""\nX = "# text"  # why\n\nclass A:\n    """Doc\n    of two lines."""\n    y: int = 1\n    """Its y."""\n'
    assert _without_comments(text) == 'X = "# text"\nclass A:\n    y: int = 1'
    assert _without_comments('def f():\n    return """a\n\n# b"""\n') == 'def f():\n    return """a\n# b"""'


def test_the_hash_of_the_code_changes_with_the_code_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("models", "pipeline", "serving"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    for stage in STAGES:
        (tmp_path / f"pipeline/{stage}.py").write_text("from models import prior\n")
    prior = tmp_path / "models/prior.py"
    prior.write_text("X = 1\n")
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)

    def sha256() -> str:
        source_files.cache_clear()
        fingerprint._hash.cache_clear()
        return code_sha256()

    before = sha256()
    prior.write_text('"""What it is."""\nX = 1  # one\n')
    assert sha256() == before
    prior.write_text("X = 2\n")
    after = sha256()
    (tmp_path / "models/other.py").write_text("Y = 1\n")  # no stage imports it
    assert after != before and sha256() == after

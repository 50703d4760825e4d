"""Evidence of a decision: stored completely; the gate refuses where it is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.flows.evidence import write_evidence
from tests.support.gate_answers import answering, contender
from tests.support.making import params

pytestmark = pytest.mark.slow

RUN_INFO = {"because": "a test", "release": "0123456789abcdef"}
FOLDER = Path("artifacts/retrain/0123456789ab")


@pytest.fixture(autouse=True)
def evaluation_files(tmp_path, monkeypatch):
    """A folder with the evaluation of a challenger that is good enough to be the first champion."""
    monkeypatch.chdir(tmp_path)
    contender(tmp_path / "artifacts/evaluation", answering(0.9, 0))
    Path("artifacts/evaluation/prior.json").rename("artifacts/prior.json")
    Path("artifacts/evaluation/report.html").write_text("<p>why</p>")


def test_a_decision_is_stored_with_its_inputs():
    decision, folder = write_evidence(params(), None, RUN_INFO)
    assert decision.promote and folder == FOLDER
    assert {path.name for path in folder.iterdir()} == {
        "decision.json", "retrain.json", "predictions.parquet", "prior.json", "report.html"}  # fmt: skip
    assert json.loads((folder / "decision.json").read_text())["inputs"]["challenger"]["predictions"] == (
        "artifacts/evaluation/predictions.parquet"
    )


@pytest.mark.parametrize("name", ["evaluation/predictions.parquet", "prior.json", "evaluation/report.html"])
@pytest.mark.parametrize("how", ["missing", "unreadable"])
@pytest.mark.fault_case("missing-evaluation-file")
def test_a_missing_or_unreadable_evaluation_file_is_a_refusal_that_names_it(name, how):
    path = Path("artifacts") / name
    path.unlink()
    problem = "no such file; run `dvc repro evaluate` first"
    if how == "unreadable":
        path.symlink_to("/proc/self/mem")  # its first byte is not readable
        problem = "cannot be copied (Input/output error)"
    decision, folder = write_evidence(params(), None, RUN_INFO)
    assert not decision.promote and not decision.computed
    assert decision.reasons == [f"cannot be computed: {path}: {problem}"]
    assert json.loads((folder / "decision.json").read_text())["computed"] is False
    assert json.loads((folder / "retrain.json").read_text())["promote"] is False
    assert not (folder / path.name).exists() and len(list(folder.iterdir())) == 4

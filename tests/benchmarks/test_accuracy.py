"""benchmarks.accuracy: smoke test of the whole comparison at a small size; no accuracy is asserted."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from benchmarks import accuracy
from pipeline.params import PARAMS_FILE, parse_params, read_yaml
from tests.support.project import ROOT

pytestmark = pytest.mark.end_to_end

SMALL = {
    "image": {"size": 8, "resize_to": 8},
    "data": {"imbalance_factor": 100, "test_per_class": 5, "validation_per_class": 1},
    "teacher": {"epochs": 1, "batch_size": 64},
    "student": {"epochs": 1, "batch_size": 64, "queue_total": 64, "queue_minimum": 2, "projection_dim": 8},
}


def test_every_method_is_trained_on_every_seed_and_an_interrupted_comparison_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(SMALL))
    arguments = [str(recipe), "--work", str(tmp_path / "work"), "--threads", "1"]
    accuracy.main([*arguments, "--seeds", "0", "--methods", "gml"])
    first = capsys.readouterr().out
    assert "seed 0, gml" in first
    accuracy.main([*arguments, "--seeds", "0", "1", "--output", str(tmp_path / "table.md")])
    second = capsys.readouterr().out
    assert "seed 0, gml\n" not in second and "seed 1, gml\n" in second
    report = (tmp_path / "table.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+ ± [\d.]+) \|", report, re.MULTILINE)
    assert [name for name, _ in rows] == list(accuracy.methods())
    assert {"cross-entropy", "balanced softmax", "teacher", "gml", "plus"} < set(accuracy.methods())
    # A row contains the mean of the stored results of the runs.
    stored = [json.loads(path.read_text())["all"] for path in sorted((tmp_path / "work").glob("*/runs/*/gml.json"))]
    assert len(stored) == 2 and dict(rows)["gml"].startswith(f"{50 * sum(stored):.2f}")


def test_an_unknown_method_is_a_usage_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    recipe = tmp_path / "small.yaml"
    recipe.write_text(yaml.safe_dump(SMALL))
    with pytest.raises(SystemExit) as ended:
        accuracy.main([str(recipe), "--methods", "gmll"])
    assert ended.value.code == 2
    assert "'gmll' is unknown; expected cross-entropy, balanced softmax" in capsys.readouterr().err


def test_the_id_of_a_comparison_depends_on_all_params_that_affect_its_results():
    params = parse_params(read_yaml(ROOT / PARAMS_FILE), PARAMS_FILE)
    plus = ROOT / accuracy.PLUS
    name = accuracy.comparison_id(params, plus)
    assert accuracy.comparison_id(accuracy.merged(params, {"seed": 7, "gate": {"confidence": 0.9}}), plus) == name
    assert accuracy.comparison_id(accuracy.merged(params, {"student": {"epochs": 3}}), plus) != name
    assert accuracy.comparison_id(params, ROOT / "recipes/variants/plus-short.yaml") != name

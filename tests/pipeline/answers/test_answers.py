"""What a release fits on validation images: sets and unknown images measured on the test split, and their use in export."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
import torch

from models.prior import softmax
from pipeline.answers.fit import fit_answers
from pipeline.answers.prediction_sets import MAX_SCORES, set_scores
from pipeline.evaluate import _predictions
from pipeline.evaluation.network_metrics import probabilities_by_target_prior
from pipeline.evaluation.predictions import Contender, load_predictions
from pipeline.onnx_export.release import decision_defaults, load_calibration, load_sets, load_unknown
from pipeline.shared.artifacts import ANSWERS, write_json
from pipeline.shared.errors import ParamsError, StageError
from tests.support.generated_run import made_logits, made_prior
from tests.support.making import params

CLASSES = 12
PRIOR = made_prior(CLASSES)
LABELS = np.repeat(np.arange(CLASSES), 60)


def fitted(changes=None, images=None):
    """Return params and the fitted answers of generated logits."""
    recipe = params(changes or {})
    validation = made_logits(LABELS, PRIOR, 2)[:images], LABELS[:images]
    test = made_logits(LABELS, PRIOR, 3), LABELS
    return recipe, fit_answers(validation, test, PRIOR, recipe.evaluate, recipe.serving)


def test_every_group_is_covered_and_alarms_have_the_wanted_rate():
    _, answers = fitted({"serving.coverage": 0.9, "serving.false_alarms": 0.1})
    for methods in answers.sets["tables"].values():
        assert methods["served"]["all"]["coverage"] > 0.87
        assert methods["served"]["few"]["coverage"] >= methods["one threshold"]["few"]["coverage"]
        assert methods["served"]["few"]["coverage"] > 0.75 and methods["served"]["below_half"] == 0
        assert methods["served"]["all"]["size"] < CLASSES / 2
    assert len(answers.sets["classes"]) == CLASSES and answers.sets["too_few"] == 0
    assert 0.07 < answers.unknown["measured"]["all"] < 0.13
    assert sum(answers.unknown["images"].values()) == len(LABELS)


def test_scores_are_of_the_logits_as_served():
    _, on = fitted()
    _, off = fitted({"serving.calibration": "none"})
    own = softmax(made_logits(LABELS, PRIOR, 2))[np.arange(len(LABELS)), LABELS]
    assert sorted(s for scores in off.sets["scores"] for s in scores) == pytest.approx(np.sort(own), rel=1e-5)
    assert on.sets["scores"] != off.sets["scores"] and on.temperature == off.temperature


def test_too_many_scores_are_thinned_evenly_over_the_large_classes():
    labels = np.concatenate([np.zeros(30_000, int), np.ones(9_000, int), np.full(50, 2)])
    sizes = [len(scores) for scores in set_scores(np.random.default_rng(0).normal(size=(len(labels), 3)), labels)]
    assert sizes[2] == 50 and sizes[1] == 9_000 and sizes[0] > 9_000 and 18_000 < sum(sizes) <= MAX_SCORES


def test_with_too_few_validation_images_a_release_has_no_part_and_params_that_want_one_are_refused(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    recipe, answers = fitted(images=29)
    assert answers.temperature is answers.calibration is answers.sets is answers.unknown is None
    write_json(ANSWERS, answers.as_json())
    assert load_calibration(recipe) is load_sets(recipe) is load_unknown(recipe) is None
    with pytest.raises(StageError, match=r"serving\.coverage is 0\.9; it needs 30 validation images, the split has 0"):
        load_sets(params({"serving.coverage": 0.9}))
    with pytest.raises(StageError, match=r"serving\.false_alarms is 0\.05; it needs at least 30 validation images"):
        load_unknown(params({"serving.false_alarms": 0.05}))


def test_a_default_coverage_above_what_validation_supports_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, answers = fitted({"serving.false_alarms": 0.02})
    write_json(ANSWERS, answers.as_json())
    assert load_sets(recipe).coverage is None and load_unknown(recipe).false_alarms == 0.02
    assert load_calibration(recipe).temperature == answers.temperature
    assert load_calibration(params({"serving.calibration": "none"})) is None
    with pytest.raises(
        StageError, match=r"serving\.coverage is 0\.9999; it needs 9999 validation images, the split has 720"
    ):
        load_sets(params({"serving.coverage": 0.9999}))
    json.loads(Path(ANSWERS).read_text())


def test_costs_of_params_name_classes_or_are_a_matrix():
    name = PRIOR.classes[3]
    defaults = decision_defaults(params({"serving.costs": {name: 20}}).serving, PRIOR)
    assert defaults.costs == [20.0 if c == 3 else 1.0 for c in range(CLASSES)] and defaults.ask is None
    assert decision_defaults(params().serving, PRIOR) is None
    with pytest.raises(ParamsError, match=r"serving\.costs names 'unicorn'; expected class names"):
        decision_defaults(params({"serving.costs": {"unicorn": 1}}).serving, PRIOR)
    with pytest.raises(ParamsError, match=r"serving\.costs has shape \[2, 2\]; expected 12 numbers"):
        decision_defaults(params({"serving.costs": [[0, 1], [1, 0]]}).serving, PRIOR)


def test_the_gate_reads_the_sets_that_evaluation_writes(tmp_path):
    _, answers = fitted({"serving.coverage": 0.8})
    logits = made_logits(LABELS, PRIOR, 3)
    test = SimpleNamespace(sample_ids=[f"{row:03d}" for row in range(len(LABELS))], labels=torch.from_numpy(LABELS))
    by_prior, calibrated = probabilities_by_target_prior(logits, PRIOR), logits / answers.temperature
    table = _predictions(test, by_prior, logits, calibrated, answers, PRIOR)
    pyarrow.parquet.write_table(table, tmp_path / "predictions.parquet")
    (tmp_path / "prior.json").write_text(json.dumps(asdict(PRIOR)))
    for target in ("balanced", "train"):
        read = load_predictions(Contender(tmp_path / "predictions.parquet", tmp_path / "prior.json"), target)
        assert read.sets.coverage == answers.sets["coverage"] == 0.8
        weights = np.array(PRIOR.p)[LABELS] if target == "train" else None
        assert np.average(read.sets.covered, weights=weights) == pytest.approx(
            answers.sets["tables"][target]["served"]["all"]["coverage"]
        )

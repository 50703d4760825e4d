"""The temperature of a release: fit, tables by shot group, label shift, the gate."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.parquet
import pytest
from scipy.optimize import minimize_scalar
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from models.calibration import MINIMUM_IMAGES, fit_served_temperature
from models.prior import calibrate_logits, log_target_prior, shot_group, softmax
from pipeline.answers.calibration import calibration_record, calibration_tables
from pipeline.data.class_prior import Prior
from pipeline.evaluation.gate import decide
from pipeline.evaluation.metrics import negative_log_likelihood
from pipeline.evaluation.predictions import CALIBRATION_NOTE, load_predictions
from pipeline.evaluation.shifted_priors import SETS, shifted_prior
from tests.support.gate_answers import FAST, LABELS, answering, contender

COUNTS = [120, 84, 59, 41, 29, 20, 14, 10, 7, 5]


@pytest.fixture(scope="module")
def digits():
    """Return overconfident balanced logits and labels of scanned digits: (validation, test), and the prior of training."""
    scans = load_digits()
    order = np.random.default_rng(1).permutation(len(scans.target))
    pixels, labels = scans.data[order] / 16, scans.target[order]
    tail = np.concatenate([np.flatnonzero(labels == c)[:count] for c, count in enumerate(COUNTS)])
    model = LogisticRegression(class_weight="balanced", max_iter=1000, C=0.1).fit(pixels[tail], labels[tail])
    rest = np.random.default_rng(2).permutation(np.setdiff1d(np.arange(len(labels)), tail))
    logits = 8 * model.decision_function(pixels[rest])
    p = np.array(COUNTS) / sum(COUNTS)
    prior = Prior(list("abcdefghij"), COUNTS, p.tolist(), np.log(p).tolist(), [shot_group(n) for n in COUNTS])
    return (logits[:300], labels[rest[:300]]), (logits[300:], labels[rest[300:]]), prior


def test_the_temperature_minimises_the_balanced_nll_with_a_penalty_of_one_image(digits):
    (logits, labels), _, _ = digits
    counts = np.bincount(labels, minlength=10)
    effective = 100 / (1 / counts).sum()

    def objective(slope):
        nll = -np.log(softmax(slope * logits)[np.arange(len(labels)), labels])
        return np.average(nll, weights=1 / counts[labels]) + (slope - 1) ** 2 / (2 * effective)

    expected = 1 / minimize_scalar(objective, bounds=(0.01, 3), method="bounded", options={"xatol": 1e-8}).x
    fitted = fit_served_temperature(logits, labels)
    assert fitted.temperature == pytest.approx(expected, rel=1e-4)
    assert fitted.size.effective == pytest.approx(effective) and not fitted.bias.any()


def test_without_an_error_in_the_validation_images_the_temperature_stays_near_1():
    labels = np.arange(MINIMUM_IMAGES) % 3
    assert 0.4 < fit_served_temperature(4 * np.eye(3)[labels], labels).temperature < 1


def test_no_temperature_is_fitted_on_too_few_images_or_on_noise():
    labels = np.arange(MINIMUM_IMAGES) % 3
    assert fit_served_temperature(np.eye(3)[labels[1:]], labels[1:]) is None
    assert fit_served_temperature(-np.eye(3)[labels], labels) is None


def test_the_temperature_holds_for_every_target_prior(digits):
    """Under each of the five shifted priors, the NLL of calibrated logits with that prior is below that of the plain ones."""
    validation, (logits, labels), prior = digits
    temperature = fit_served_temperature(*validation).temperature
    assert temperature > 1.5
    counts = np.bincount(labels, minlength=10)
    for name, ratio in SETS.items():
        target = shifted_prior(prior.counts, ratio)
        weights = (target / counts)[labels]
        before, after = (
            negative_log_likelihood(softmax(z + log_target_prior(target)), labels, weights)
            for z in (logits, calibrate_logits(logits, temperature))
        )
        assert after < 0.9 * before, name


def test_the_prior_is_added_after_the_division():
    """Logits that are 3 times the exact log-likelihoods of Gaussian classes: with a known prior NLL is least in this order."""
    random = np.random.default_rng(0)
    means = random.normal(size=(5, 4))
    prior = np.array([0.6, 0.25, 0.1, 0.04, 0.01])

    def drawn(p, images):
        labels = random.choice(5, images, p=p)
        points = means[labels] + random.normal(size=(images, 4))
        return -1.5 * ((points[:, None] - means) ** 2).sum(-1), labels

    temperature = fit_served_temperature(*drawn(np.full(5, 0.2), 4000)).temperature
    assert temperature == pytest.approx(3, rel=0.05)
    logits, labels = drawn(prior, 4000)
    served = softmax(calibrate_logits(logits, temperature) + np.log(prior))
    reverse = softmax(calibrate_logits(logits + np.log(prior), temperature))
    plain = softmax(logits + np.log(prior))
    losses = [negative_log_likelihood(p, labels) for p in (served, reverse, plain)]
    assert losses[0] + 0.05 < min(losses[1:])


def test_the_tables_follow_the_target_prior_and_leave_out_groups_without_images(digits):
    validation, (logits, labels), prior = digits
    tables = calibration_tables(logits, labels, prior, fit_served_temperature(*validation).temperature, 15)
    assert set(tables["balanced"]["before"]) == {"all", "many", "medium", "few"}
    for sides in tables.values():
        assert sides["after"]["all"]["nll"] < sides["before"]["all"]["nll"]
        assert sides["after"]["all"]["ece"] < sides["before"]["all"]["ece"]
    by_class = [np.mean(logits[labels == c].argmax(1) == c) for c in range(10)]
    assert tables["balanced"]["before"]["all"]["accuracy"] == pytest.approx(np.mean(by_class))
    assert tables["balanced"]["before"] | {} != tables["train"]["before"]
    head = labels == 0
    only_head = calibration_tables(logits[head], labels[head], prior, 2.0, 15)
    assert set(only_head["train"]["after"]) == {"all", "many"}


@pytest.mark.parametrize("served", [True, False])
def test_the_gate_compares_the_probabilities_as_served(tmp_path, served):
    logits = 3 * answering(0.7, 0)
    plain, other = contender(tmp_path / "a", logits), contender(tmp_path / "b", logits)
    prior = load_predictions(plain).prior
    record = calibration_record(fit_served_temperature(logits, LABELS), served, logits, LABELS, prior, 15)
    table = pyarrow.parquet.read_table(other.predictions)
    pyarrow.parquet.write_table(
        table.replace_schema_metadata({CALIBRATION_NOTE: json.dumps(record)}), other.predictions
    )
    decision = decide(other, plain, FAST, 15, tmp_path / "decision.json")
    assert (decision.measures["nll"].difference < -0.1) == served == (decision.measures["ece"].difference < -0.05)
    assert decision.measures["all"].difference == 0
    written = json.loads((tmp_path / "decision.json").read_text())["calibration"]
    assert written == {"challenger": record, "champion": None}


@pytest.mark.parametrize("note", ['{"served": true}', '{"served": true, "temperature": 0}', "[1]", "no json"])
def test_a_damaged_note_is_a_refusal_that_names_the_file(tmp_path, note):
    made = contender(tmp_path / "a", answering(0.9, 0))
    table = pyarrow.parquet.read_table(made.predictions)
    pyarrow.parquet.write_table(table.replace_schema_metadata({CALIBRATION_NOTE: note}), made.predictions)
    decision = decide(made, None, FAST, 15, None)
    assert not decision.computed and "predictions.parquet: " in decision.reasons[0] and "damaged" in decision.reasons[0]

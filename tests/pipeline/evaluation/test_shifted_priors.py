"""The table of results on the five shifted test sets."""

import numpy as np
import pytest

from pipeline.commands.app import main
from pipeline.evaluation.shifted_priors import SETS, shift_table, shifted_prior, shifted_rows
from pipeline.report.analysis import COARSE_TOLERANCE
from pipeline.shared.errors import DataError
from tests.support.gate_answers import COUNTS, LABELS, answering, contender
from tests.support.generated_run import made_logits, made_prior


@pytest.mark.parametrize("ratio", SETS.values(), ids=SETS)
def test_a_shifted_set_follows_the_training_counts_by_its_ratio_without_repeated_samples(ratio):
    prior = shifted_prior([8, 300, 60], ratio)
    assert prior[1] / prior[0] == pytest.approx(ratio) and prior.sum() == pytest.approx(1)
    assert prior[1] / prior[2] == pytest.approx(ratio**0.5)
    labels = np.repeat(np.arange(3), 500)
    rows = shifted_rows(labels, prior, np.random.default_rng(0))
    assert len(set(rows.tolist())) == len(rows)
    assert np.bincount(labels[rows]) / len(rows) == pytest.approx(prior, abs=2 / 500)


def gaussian_logits():
    means = np.random.default_rng(0).normal(size=(6, 4))
    points = means[LABELS] + np.random.default_rng(1).normal(size=(len(LABELS), 4))
    return points @ means.T - (means**2).sum(1) / 2


def test_the_known_prior_raises_accuracy_under_shift_and_changes_nothing_without():
    rows = {row["prior"]: row for row in shift_table(gaussian_logits(), LABELS, COUNTS, draws=10)}
    none, known, estimated = (rows[name] for name in ("no adjustment", "known prior", "estimated prior (EM)"))
    assert known["uniform"] == none["uniform"]
    for name in ("forward 50", "backward 50"):
        assert known[name] > none[name] + 0.05 and estimated[name] > none[name]
    assert all(0 <= rows["distance of EM"][name] < 0.3 for name in SETS)


def test_the_same_seed_gives_the_same_table_and_another_seed_another():
    logits = gaussian_logits()
    one, same, other = (shift_table(logits, LABELS, COUNTS, draws=2, seed=seed) for seed in (0, 0, 1))
    assert one == same and one != other


def test_a_class_without_test_samples_is_refused():
    with pytest.raises(DataError, match="class 2 has no test sample"):
        shifted_rows(np.array([0, 1]), np.full(3, 1 / 3), np.random.default_rng(0))


def test_the_command_prints_the_table_and_refuses_misuse(tmp_path, capsys):
    made = contender(tmp_path, answering(0.8, 0))
    files = ["--predictions", str(made.predictions), "--prior", str(made.prior)]
    assert main(["shifted-priors", *files, "--draws", "2", "--output", str(tmp_path / "t.csv")]) == 0
    assert "known prior" in capsys.readouterr().out
    assert (tmp_path / "t.csv").read_text().startswith("prior,forward 50,forward 10,uniform,backward 10,backward 50\n")
    assert main(["shifted-priors", *files, "--draws", "0"]) == 2
    assert main(["shifted-priors", "--predictions", str(tmp_path / "none"), "--prior", str(made.prior)]) == 1
    assert "no such file" in capsys.readouterr().err


@pytest.mark.slow
def test_coarse_estimates_change_no_accuracy_by_more_than_a_third_of_a_point():
    classes = 1000
    prior, labels = made_prior(classes), np.repeat(np.arange(classes), 3)
    logits = made_logits(labels, prior, 1)
    full, coarse = (
        shift_table(logits, labels, prior.counts, draws=1, tolerance=nats)
        for nats in (1e-2, COARSE_TOLERANCE * classes)
    )
    for row, other in zip(full, coarse, strict=True):
        assert all(abs(row[name] - other[name]) <= 0.0034 for name in SETS), row["prior"]

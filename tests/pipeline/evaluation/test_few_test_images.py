"""Results from too few test images: every command reports them, and the gate does not decide by them."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score

from models.prior import shot_group
from models.sample_size import ENOUGH
from pipeline.commands.app import main as tailor
from pipeline.commands.evaluation import print_comparison
from pipeline.data.assignment import assign
from pipeline.evaluation.gate import decide
from pipeline.evaluation.intervals import weighted_accuracy
from pipeline.evaluation.metrics import prediction_metrics
from pipeline.evaluation.predictions import Predictions
from pipeline.evaluation.run_comparison import as_json, compare_runs
from pipeline.params import GateParams
from pipeline.preparation.check import sample_sizes
from pipeline.preparation.folder_summary import expected_tests
from pipeline.report import render_comparison
from tests.support.chosen_params import chosen_params, folder_summary
from tests.support.data_commands import command, report
from tests.support.gate_answers import COUNTS, FAST, C, answers_of, contender
from tests.support.generated_run import made_model_card, made_prior, made_report
from tests.support.making import ROOT, data_params, folder, params, rows_of


@settings(max_examples=20)
@given(st.lists(st.integers(2, 400), min_size=2, max_size=12), st.floats(0.01, 0.99), st.integers(1, 60))
def test_a_share_of_each_class_is_held_out_at_least_one_image_and_at_most_the_cap(counts, share, cap):
    data = params({"data.profile": "natural", "data.test_share": share, "data.test_per_class": cap}).data
    splits = assign(rows_of(counts), [str(c) for c in range(len(counts))], data)
    tested, trained = (Counter(row.label for row in splits[name]) for name in ("test", "train"))
    for label, count in enumerate(counts):
        assert 1 <= tested[label] <= cap and trained[label] >= 1
        assert tested[label] <= max(1, share * count + 1e-6)
        assert tested[label] in (cap, count - 1) or tested[label] + 1 > share * count


def test_init_predicts_the_sizes_of_the_test_split():
    counts = [300, 120, 60, 40, 20, 10, 8, 7, 5, 4, 3, 2]
    summary = folder_summary(counts)
    data = chosen_params(summary).data
    splits = assign(rows_of(counts), summary.classes, data)
    assert len(splits["test"]) == 106  # one quarter of the smallest class would be 12
    tested, trained = (np.bincount([row.label for row in splits[name]], minlength=12) for name in ("test", "train"))
    assert expected_tests(summary) == sample_sizes(tested, [shot_group(count) for count in trained])


def test_init_and_data_check_print_the_groups_with_too_few_test_images(tmp_path, monkeypatch, capsys):
    root = folder(tmp_path / "photos", {"ant": 12, "bee": 5, "cat": 3})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert tailor(["init", "photos", "--force"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[0].startswith("init: warning: all: 4 test images, which count as 4") or "all: 4 test images" in lines[0]
    )
    assert "hold out more of them (data.test_share)" in lines[-1]
    assert command(tmp_path, data_params(root, test_per_class=1)) == 0
    assert "warning: all: 3 test images, fewer than 100" in capsys.readouterr().out
    assert report(tmp_path)["test_images"]["few"] == {"images": 3, "effective": pytest.approx(3), "too_few": True}
    assert len(report(tmp_path)["warnings"]) == 2


def unequal(tested, seed=0):
    """Return labels with the given class sizes, and logits that are correct for 6 or 9 of 10."""
    random, labels = np.random.default_rng(seed), np.repeat(np.arange(len(tested)), tested)
    right = random.random(len(labels)) < np.where(labels % 2, 0.6, 0.9)
    predicted = np.where(right, labels, (labels + 1) % len(tested))
    return labels, np.eye(len(tested))[predicted] * random.uniform(1, 4, (len(labels), 1))


def test_metrics_of_unequal_test_counts_equal_scikit_learns_and_include_the_number_of_images():
    labels, logits = unequal([200, 90, 20, 4])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    groups = ["many", "many", "few", "few"]
    metrics = prediction_metrics(p, labels, groups, np.full(4, 0.25), bins=15, top_k=2)
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, p.argmax(1)))
    few = labels >= 2
    assert metrics["few"] == pytest.approx(np.mean([(p.argmax(1) == labels)[labels == c].mean() for c in (2, 3)]))
    assert metrics["at_target_prior"]["all"] == pytest.approx(metrics["balanced_accuracy"])
    assert metrics["test_images"]["few"]["images"] == few.sum() and metrics["test_images"]["few"]["too_few"]
    assert not metrics["test_images"]["many"]["too_few"]


def test_intervals_of_unequal_test_counts_cover_the_truth_within_binomial_noise():
    tested, truth = np.array([150, 40, 12, 5]), np.array([0.9, 0.8, 0.6, 0.5])
    random, covered = np.random.default_rng(2), 0
    for trial in range(200):
        estimate = weighted_accuracy(random.binomial(tested, truth), tested, np.ones(4), seed=trial)
        covered += estimate.low <= truth.mean() <= estimate.high
    assert covered >= 180  # of 200 at 95 %: fewer than 180 have a probability of 1/400


SMALL_TAIL = [80, 60, 40, 40, 30, 20]  # 270 test images: effective size 221 for the mean over all classes, few: 48


def two_runs(tmp_path, tested):
    """A champion, and a challenger with two errors in the test images, both of the last class."""
    labels = np.repeat(np.arange(C), tested)
    good = np.eye(C)[labels] * 3.0
    worse = good.copy()
    worse[np.flatnonzero(labels == C - 1)[:2]] = np.eye(C)[0]
    pair = [contender(tmp_path / name, logits, labels=labels) for name, logits in (("a", good), ("b", worse))]
    return pair, labels


def test_the_gate_does_not_decide_by_too_few_test_images_and_prints_the_remedy(tmp_path, capsys):
    (champion, challenger), _ = two_runs(tmp_path, SMALL_TAIL)
    decided = decide(challenger, champion, FAST, 15, tmp_path / "d.json")
    assert decided.undecided and decided.computed and not decided.promote and decided.verdict == "not decided"
    assert "few: 50 test images" in decided.reasons[0] and "gate.few.rule: none" in decided.reasons[0]
    assert decided.measures["few"].passed is None and decided.measures["all"].passed is True
    content = json.loads((tmp_path / "d.json").read_text())
    assert content["undecided"] is True and content["measures"]["few"]["images"] == 50
    equal = decide(champion, champion, FAST, 15, None)
    assert equal.undecided and not equal.promote  # also for equal models: no difference on 50 images is no evidence
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    arguments = ["--challenger", challenger.predictions, "--challenger-prior", challenger.prior, "--champion"]
    arguments += [champion.predictions, "--champion-prior", champion.prior, "--output", tmp_path / "e.json"]
    assert tailor(["gate", *map(str, arguments), "--params", str(tmp_path / "params.yaml")]) == 3
    assert capsys.readouterr().out.startswith("gate: not decided: few: 50 test images")


def test_without_a_rule_on_the_small_group_the_gate_decides(tmp_path):
    (champion, challenger), _ = two_runs(tmp_path, SMALL_TAIL)
    without = GateParams.model_validate({"resamples": 300, "few": {"rule": "none"}})
    assert decide(challenger, champion, without, 15, None).promote


def test_a_loss_on_enough_images_is_refused_although_a_small_group_is_undecided(tmp_path):
    (champion, _), labels = two_runs(tmp_path, SMALL_TAIL)
    bad = contender(tmp_path / "c", np.eye(C)[np.zeros(len(labels), int)] * 3.0, labels=labels)
    refused = decide(bad, champion, FAST, 15, None)
    assert not refused.promote and not refused.undecided and refused.reasons[0].startswith("all ")


def test_the_gate_does_not_decide_if_the_mean_over_all_classes_has_too_few_images(tmp_path):
    """228 test images are enough, but most are of the head: effective size 59, as evaluate and data check print."""
    (champion, challenger), labels = two_runs(tmp_path, [80, 60, 40, 40, 5, 3])
    decision = decide(challenger, champion, FAST, 15, None)
    assert decision.undecided and decision.reasons[0].startswith(
        "all: 228 test images, which count as 59 in a mean over"
    )
    assert decision.measures["all"].size == sample_sizes(np.bincount(labels), ["many"] * C)["all"]


def test_a_first_model_on_too_few_images_is_not_decided_unless_there_is_no_floor(tmp_path):
    (champion, _), _ = two_runs(tmp_path, [2] * C)
    first = decide(champion, None, FAST, 15, None)
    assert first.undecided and not first.promote and "of 12 test images" in first.reasons[0]
    assert decide(champion, None, FAST.model_copy(update={"floor": 0.0}), 15, None).promote


def test_a_comparison_marks_each_measure_of_too_few_images(capsys):
    logits = np.eye(C)[np.repeat(np.arange(C), 60)] * 3.0
    big = answers_of(logits)
    few = np.arange(len(logits)) % 60 < 2
    small = Predictions([i for i, keep in zip(big.sample_ids, few, strict=True) if keep], big.labels[few],
                    big.probabilities[few], big.prior)  # fmt: skip
    comparison = compare_runs(small, small, ("one", "two"), FAST, 15)
    content = as_json(comparison)
    assert content["measures"]["all"]["too_few"] and content["measures"]["few"]["images"] == 4
    assert len(content["warnings"]) == len(comparison.warnings) == 6
    print_comparison(comparison, 0)
    assert "warning: all: 12 test images, fewer than 100" in capsys.readouterr().out
    assert "Too few test images to compare" in render_comparison(comparison, "x")
    assert compare_runs(big, big, ("one", "two"), FAST, 15).warnings == [] and COUNTS[-1] < 20


def test_report_and_model_card_have_the_warning_only_with_too_few_images():
    page, enough = made_report(10, 3), made_report(10, ENOUGH)
    assert "Too few test images to evaluate this model" in page and "all: 30 test images, fewer than 100" in page
    assert page.count('class="warning">few test images') >= 6
    assert "Too few test images" not in enough and 'class="warning">few' not in enough
    prior = made_prior(10)
    for per_class, warned in ((3, True), (ENOUGH, False)):
        labels = np.repeat(np.arange(10), per_class)
        p = np.full((len(labels), 10), 0.1)
        values = prediction_metrics(p, labels, prior.groups, np.full(10, 0.1), bins=15, top_k=2)
        card = made_model_card(prior, {"balanced": values, "train": values})
        assert ("**Too few test images.** all: 30 test images" in card) is warned

"""The gate: cases of promotion and refusal; it refuses results that it cannot compute."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, log_loss

from pipeline.answers.calibration import calibration_tables
from pipeline.commands.app import main
from pipeline.evaluation.comparison import compare, mcnemar, not_judged, paired_interval
from pipeline.evaluation.gate import decide
from pipeline.evaluation.metrics import (
    adjusted_probabilities,
    expected_calibration_error,
    prediction_metrics,
    resampled_ece,
)
from pipeline.evaluation.predictions import COVERAGE_NOTE, Contender, GateError, Predictions, Sets, load_predictions
from pipeline.params import GateParams
from tests.support.gate_answers import FAST, LABELS, C, answering, answers_of, contender, prior_of


@settings(max_examples=8)
@given(st.integers(0, 10**6), st.floats(0.2, 0.95), st.floats(0.2, 0.95))
def test_swapping_champion_and_challenger_mirrors_every_difference(seed, one, other):
    a, b = answers_of(answering(one, seed)), answers_of(answering(other, seed + 1))
    forward, backward = compare(a, b, FAST, 15), compare(b, a, FAST, 15)
    for name, measure in forward.items():
        assert measure.difference == pytest.approx(-backward[name].difference, abs=1e-12)
        assert (measure.low, measure.high) == pytest.approx((-backward[name].high, -backward[name].low), abs=1e-12)
        assert measure.mcnemar == backward[name].mcnemar


@settings(max_examples=5)
@given(st.integers(0, 10**6), st.sampled_from(["beyond_noise", "estimate", "proven"]))
def test_an_identical_model_is_refused_by_no_rule(seed, rule):
    strict = GateParams.model_validate(
        {"resamples": 100, **{name: {"rule": rule} for name in ("all", "many", "medium", "few", "ece", "nll")}}
    )
    same = answers_of(answering(0.7, seed))
    assert all(measure.passed for measure in compare(same, same, strict, 15).values())


def test_a_challenger_worse_on_few_only_is_refused_for_few_only(tmp_path):
    logits = answering(0.9, 0)
    worse = logits.copy()
    worse[LABELS == C - 1] = np.eye(C)[0]
    worse[LABELS == 0] = np.eye(C)[0]  # the head compensates for a part of it
    decision = decide(
        contender(tmp_path / "b", worse), contender(tmp_path / "a", logits), FAST, 15, tmp_path / "d.json"
    )
    assert not decision.promote and decision.computed
    assert decision.measures["few"].passed is False and decision.measures["few"].high < 0
    assert decision.measures["many"].difference >= 0
    content = json.loads((tmp_path / "d.json").read_text())
    assert (
        content["promote"] is False and content["measures"]["few"]["difference"] == decision.measures["few"].difference
    )
    assert any(reason.startswith("few ") for reason in content["reasons"])


def test_the_gate_refuses_a_real_loss_and_seldom_a_random_one():
    few_off = GateParams.model_validate({"resamples": 200, "few": {"rule": "none"}})
    refused = {0.8: 0, 0.6: 0}
    for accuracy in refused:
        for seed in range(30):
            pair = answers_of(answering(accuracy, 2 * seed + 1)), answers_of(answering(0.8, 2 * seed))
            refused[accuracy] += compare(*pair, few_off, 15)["all"].passed is False
    # One-sided 2.5 % of 30: four or more by chance have a probability of 1/150.
    assert refused[0.8] <= 3 and refused[0.6] >= 28


def test_intervals_cover_the_true_difference_within_binomial_noise():
    covered = 0
    for seed in range(100):
        pair = answers_of(answering(0.75, 2 * seed)), answers_of(answering(0.7, 2 * seed + 1))
        measure = compare(*pair, GateParams(resamples=200), 15)["all"]
        covered += measure.low <= 0.05 <= measure.high
    assert 88 <= covered <= 100  # 95 of 100, three standard errors either way


def test_mcnemar_counts_the_samples_that_only_one_model_predicts_correctly():
    a = np.array([True] * 6 + [False] * 1 + [True] * 9)
    b = np.array([False] * 6 + [True] * 1 + [True] * 9)
    same = np.full(16, 0.25)
    assert mcnemar(a, b, same, FAST) == pytest.approx(2 * (1 + 7) / 2**7)
    assert mcnemar(a, a, same, FAST) == 1.0


def test_mcnemar_with_unequal_weights_is_the_share_of_sign_vectors_with_a_larger_sum():
    a = np.array([True, True, False, False, False, False, True])
    b = np.array([False, True, True, True, True, True, True])
    weights = np.array([5.0, 9, 1, 1, 1, 0.5, 9])
    differ, signs = [0, 2, 3, 4, 5], np.array(list(itertools.product([-1, 1], repeat=5)))
    expected = np.mean(np.abs(signs @ weights[differ]) >= abs(-5 + 1 + 1 + 1 + 0.5) - 1e-12)
    many = GateParams(resamples=20_000)
    assert mcnemar(a, b, weights, many) == pytest.approx(expected, abs=0.015)  # four standard errors
    assert mcnemar(b, a, weights, many) == mcnemar(a, b, weights, many)


UNEQUAL = np.repeat(np.arange(C), [900, 400, 100, 60, 40, 30])


def on_unequal(predicted):
    """Return confident predictions on a test split of unequal classes."""
    return Predictions([str(i) for i in range(len(UNEQUAL))], UNEQUAL, np.eye(C)[predicted] * 0.9 + 0.1 / C, prior_of())


@pytest.mark.parametrize("target", ["balanced", "train"])
def test_all_weighs_the_classes_by_the_target_prior_as_evaluate_does(target):  # pragma: allowlist secret
    random = np.random.default_rng(4)
    predicted = [np.where(random.random(len(UNEQUAL)) < share, UNEQUAL, 0) for share in (0.5, 0.8)]
    champion, challenger = map(on_unequal, predicted)
    measure = compare(challenger, champion, GateParams(resamples=100, target_prior=target), 15)["all"]
    p = np.array(prior_of().p) if target == "train" else np.full(C, 1 / C)
    metrics = [
        prediction_metrics(a.probabilities, UNEQUAL, a.prior.groups, p, bins=15, top_k=2)
        for a in (champion, challenger)
    ]
    assert [measure.champion, measure.challenger] == pytest.approx([m["at_target_prior"]["all"] for m in metrics])
    if target == "balanced":
        assert measure.challenger == pytest.approx(balanced_accuracy_score(UNEQUAL, predicted[1]))
        assert measure.effective == pytest.approx(metrics[0]["test_images"]["all"]["effective"])


def test_gains_in_head_classes_do_not_offset_a_loss_in_tail_classes():
    """70 tail images become wrong and 120 head images correct: accuracy rises, and balanced accuracy falls."""
    champion, challenger = UNEQUAL.copy(), UNEQUAL.copy()
    champion[:120] = 1
    challenger[UNEQUAL >= 4] = 0
    few_off = GateParams.model_validate({"resamples": 300, "few": {"rule": "none"}})
    measure = compare(on_unequal(challenger), on_unequal(champion), few_off, 15)["all"]
    assert measure.difference == pytest.approx((120 / 900 - 2) / C)
    assert measure.mcnemar < 0.05 and measure.passed is False


def test_the_resampled_ece_equals_the_ece_of_the_resampled_rows():
    p = answers_of(answering(0.6, 3)).probabilities
    index = np.random.default_rng(0).integers(0, len(LABELS), (5, len(LABELS)))
    expected = [expected_calibration_error(p[rows], LABELS[rows], 15) for rows in index]
    assert resampled_ece(p, LABELS, 15)(index).tolist() == pytest.approx(expected, abs=1e-12)
    assert paired_interval(lambda rows: rows.mean(-1), 1, FAST) == (-1.0, 1.0)


def test_the_first_model_must_reach_the_floor(tmp_path):
    good, bad = contender(tmp_path / "a", answering(0.9, 0)), contender(tmp_path / "b", answering(0.1, 0))
    assert decide(good, None, FAST, 15, None).promote
    refused = decide(bad, None, FAST, 15, None)
    assert not refused.promote and refused.computed and "below gate.floor 30.0%" in refused.reasons[0]


def test_a_gate_that_cannot_be_computed_refuses_with_the_reason(tmp_path):
    logits = answering(0.9, 0)
    champion = contender(tmp_path / "a", logits)
    nan, other_label = logits.copy(), LABELS.copy()
    nan[0, 0], other_label[0] = np.nan, 1
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1")
    cases = {
        "no such file": Contender(tmp_path / "nowhere.parquet", champion.prior),
        "damaged": Contender(tmp_path / "damaged.parquet", champion.prior),
        "different classes: only one has 'b'": contender(tmp_path / "c", logits, classes=["owl", *"bcdef"]),
        "logits have shape [360, 5]": contender(tmp_path / "d", logits[:, :5]),
        "tested on different samples": contender(tmp_path / "e", logits, ids=[f"t{i}" for i in range(360)]),
        "a sample id in more than one row": contender(tmp_path / "f", logits, ids=["s0"] * 360),
        "has two labels": contender(tmp_path / "g", logits, labels=other_label),
        "not finite": contender(tmp_path / "h", nan),
    }
    for reason, challenger in cases.items():
        decision = decide(challenger, champion, FAST, 15, tmp_path / "decision.json")
        assert not decision.promote and not decision.computed
        assert decision.reasons[0].startswith("cannot be computed: ") and reason in decision.reasons[0], (
            decision.reasons
        )
        assert json.loads((tmp_path / "decision.json").read_text())["computed"] is False
    decision = decide(champion, None, FAST, 15, None, GateError("report.html: no such file"))
    assert not decision.promote and decision.reasons == ["cannot be computed: report.html: no such file"]
    timed = GateParams(resamples=100, latency_ratio=1.2)
    assert "was not measured" in decide(champion, champion, timed, 15, None).reasons[0]


def test_latency_above_the_ratio_is_refused(tmp_path):
    timed = GateParams(resamples=100, latency_ratio=1.2)
    logits = answering(0.9, 0)
    slow, fast = (contender(tmp_path / name, logits, latency_ms=ms) for name, ms in (("slow", 1.5), ("fast", 1.0)))
    assert decide(fast, slow, timed, 15, None).promote
    assert decide(slow, fast, timed, 15, None).reasons[0].startswith("latency_ms 1.0000 → 1.5000")


def test_the_command_prints_its_decision_and_sets_the_exit_code(tmp_path, capsys):
    made = contender(tmp_path / "a", answering(0.9, 0))
    challenger = [
        "--challenger",
        str(made.predictions),
        "--challenger-prior",
        str(made.prior),
        "--output",
        str(tmp_path / "d"),
    ]
    assert main(["gate", *challenger]) == 0
    assert capsys.readouterr().out.startswith("gate: promote: first model, balanced accuracy")
    champion = ["--champion", str(tmp_path / "none"), "--champion-prior", str(made.prior)]
    assert main(["gate", *challenger, *champion]) == 1
    assert "gate: refuse: cannot be computed" in capsys.readouterr().out
    assert main(["gate", *challenger, "--champion", "x"]) == 2
    assert "--champion and --champion-prior go together" in capsys.readouterr().err


def with_sets(predictions, covered, coverage=0.9):
    return replace(predictions, sets=Sets(coverage, covered))


def test_coverage_counts_only_below_what_is_wanted_and_the_group_that_misses_it_is_named():
    rule = GateParams.model_validate({"resamples": 200, "coverage": {"rule": "beyond_noise"}})
    plain, random = answers_of(answering(0.8, 0)), np.random.default_rng(0)
    exact, wide = (random.random(len(LABELS)) < share for share in (0.9, 0.98))
    few = exact.copy()
    few[LABELS >= C - 2] = random.random((LABELS >= C - 2).sum()) < 0.5
    narrower = compare(with_sets(plain, exact), with_sets(plain, wide), rule, 15)
    assert all(narrower[name].passed for name in narrower if name.startswith("coverage"))
    missing = compare(with_sets(plain, few), with_sets(plain, exact), rule, 15)
    assert [name for name, measure in missing.items() if measure.passed is False] == ["coverage", "coverage few"]
    share = few[LABELS >= C - 2].mean()
    assert missing["coverage few"].challenger == pytest.approx(0.9 - share)
    assert missing["coverage few"].champion == pytest.approx(max(0, 0.9 - exact[LABELS >= C - 2].mean()))


def probable(confidence, seed, labels=LABELS, groups=("many", "medium", "few")):
    """Predictions that are right for 70 % of the images and have `confidence`; 0.7 outside `groups`."""
    random, names = np.random.default_rng(seed), np.array(prior_of().groups)
    predicted = np.where(random.random(len(labels)) < 0.7, labels, (labels + 1) % C)
    top = np.where(np.isin(names[labels], groups), confidence, 0.7)[:, None]
    p = np.where(np.arange(C) == predicted[:, None], top, (1 - top) / (C - 1))
    return Predictions([str(i) for i in range(len(labels))], labels, p, prior_of())


@pytest.mark.parametrize("target", ["balanced", "train"])
def test_calibration_of_each_group_is_that_of_the_tables_in_the_decision(target):  # pragma: allowlist secret
    random = np.random.default_rng(0)
    logits = random.normal(size=(len(UNEQUAL), C)) + 2 * np.eye(C)[UNEQUAL]
    p = adjusted_probabilities(logits, np.array(prior_of().log_prior), float(target == "train"))
    run = Predictions([str(i) for i in range(len(UNEQUAL))], UNEQUAL, p, prior_of())
    measures = compare(run, run, GateParams(resamples=100, target_prior=target), 15)
    tables = calibration_tables(logits, UNEQUAL, prior_of(), 1.0, 15)[target]["before"]
    for error, group in itertools.product(("ece", "nll"), ("many", "medium", "few")):
        assert measures[f"{error} {group}"].challenger == pytest.approx(tables[group][error])
    assert measures["nll"].challenger == pytest.approx(log_loss(UNEQUAL, p))


@pytest.mark.parametrize(("error", "margin"), [("ece", 0.15), ("nll", 0.3)])
def test_overconfidence_on_few_only_refuses_by_the_rule_of_the_whole(tmp_path, error, margin):
    few, plain = probable(0.98, 0, groups=("few",)), probable(0.7, 0)
    rule = GateParams.model_validate({"resamples": 200, "few": {"rule": "none"}, error: {"rule": "beyond_noise"}})
    measures = compare(few, plain, rule, 15)
    refused = [name for name, measure in measures.items() if measure.passed is False]
    assert refused == [error, f"{error} few"] and measures[f"{error} many"].difference == pytest.approx(0, abs=1e-12)
    wide = GateParams.model_validate(
        {"resamples": 200, "few": {"rule": "none"}, error: {"rule": "estimate", "margin": margin}}
    )
    assert [name for name, each in compare(few, plain, wide, 15).items() if each.passed is False] == [f"{error} few"]
    logits = {name: np.log(each.probabilities) for name, each in (("few", few), ("plain", plain))}
    runs = [contender(tmp_path / name, values) for name, values in logits.items()]
    assert any(reason.startswith(f"{error} few ") for reason in decide(*runs, rule, 15, None).reasons)
    assert decide(*runs, GateParams(resamples=100), 15, None).promote  # off by default


def test_a_group_with_few_images_is_named_and_not_judged(tmp_path):
    rules = {
        "few": {"rule": "none"},
        "ece": {"rule": "estimate", "margin": 0.15},
        "nll": {"rule": "estimate", "margin": 0.3},
    }
    params = GateParams.model_validate({"resamples": 100, **rules})
    over, plain = (np.log(probable(p, 0, UNEQUAL, ("few",)).probabilities) for p in (0.98, 0.7))
    runs = [
        contender(tmp_path / str(i), values, labels=UNEQUAL, ids=range(len(UNEQUAL)))
        for i, values in enumerate((over, plain))
    ]
    decision = decide(*runs, params, 15, tmp_path / "decision.json")
    assert decision.promote and not decision.undecided
    written = json.loads((tmp_path / "decision.json").read_text())["not_judged"]
    assert [line.partition(":")[0] for line in written] == ["ece few", "nll few"] and "70 test images" in written[0]
    assert decision.measures["ece few"].passed is None and decision.measures["ece few"].difference > 0.15
    assert decision.measures["ece medium"].passed
    assert "not judged: ece few: 70 test images" in str(decision)


def test_a_group_without_test_images_is_not_judged():
    labels = np.repeat(np.arange(C - 2), 100)
    run = replace(probable(0.7, 0, labels), sets=Sets(0.9, np.ones(len(labels), dtype=bool)))
    rules = {name: {"rule": "estimate"} for name in ("ece", "nll", "coverage")}
    measures = compare(run, run, GateParams.model_validate({"resamples": 100} | rules), 15)
    lines = not_judged(measures)
    assert [line.partition(":")[0] for line in lines] == ["ece few", "nll few", "coverage few"]
    assert all("no test images" in line for line in lines)


@pytest.mark.parametrize("error", ["ece", "nll"])
def test_a_rule_of_calibration_does_not_decide_on_fewer_than_100_images(tmp_path, error):
    labels = np.repeat(np.arange(C), [40, 20, 10, 10, 10, 9])
    runs = [
        contender(
            tmp_path / str(p), np.log(probable(p, 0, labels).probabilities), labels=labels, ids=range(len(labels))
        )
        for p in (0.98, 0.7)
    ]
    rules = {"all": {"rule": "none"}, "few": {"rule": "none"}, error: {"rule": "estimate"}}
    decision = decide(*runs, GateParams.model_validate({"resamples": 100} | rules), 15, None)
    assert decision.undecided and decision.reasons[0].startswith(f"{error}: 99 test images")


@pytest.mark.parametrize(
    ("note", "covered"),
    [("0.9", [None] * len(LABELS)), ('"high"', [True] * len(LABELS)), ("[0.9]", [True] * len(LABELS)),
     ("NaN", [True] * len(LABELS)), ("2.0", [True] * len(LABELS)), ("0.9", [1] * len(LABELS)), ("0.9", None)],
)  # fmt: skip
def test_damaged_sets_of_a_run_are_named(tmp_path, note, covered):
    run = contender(tmp_path, answering(0.8, 0))
    table = pyarrow.parquet.read_table(run.predictions)
    if covered is not None:
        table = table.append_column("covered_balanced", [covered])
    pyarrow.parquet.write_table(table.replace_schema_metadata({COVERAGE_NOTE: note}), run.predictions)
    with pytest.raises(GateError, match=r"predictions\.parquet: .*damaged.*dvc repro -f evaluate"):
        load_predictions(run)


def test_a_rule_for_coverage_needs_the_sets_of_both():
    rule = GateParams.model_validate({"resamples": 100, "coverage": {"rule": "estimate"}})
    plain = answers_of(answering(0.8, 0))
    sets = with_sets(plain, np.ones(len(LABELS), dtype=bool))
    with pytest.raises(GateError, match=r"gate\.coverage is set, but the champion has no prediction sets"):
        compare(sets, plain, rule, 15)
    assert not any(name.startswith("coverage") for name in compare(plain, sets, FAST, 15))

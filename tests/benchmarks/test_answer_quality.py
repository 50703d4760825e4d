"""Measures of benchmarks.answer_quality: AUROC and FPR95 against scikit-learn and pytorch-ood, and the classes left out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from benchmarks.answer_quality import (
    LEAST_WEIGHTS,
    chosen_weight,
    detection,
    fitted,
    leave_out,
    set_rows,
    unknown_scores,
    weight_rows,
)
from models.decisions import familiarity
from tests.support.clusters import clusters


@pytest.mark.parametrize("seed", range(5))
def test_auroc_and_fpr_equal_scikit_learn_also_with_equal_scores(seed):
    random = np.random.default_rng(seed)
    known, unknown = random.normal(1, 1, 200).round(1), random.normal(0, 1, 150).round(1)
    labels, scores = np.repeat([0, 1], [200, 150]), -np.concatenate([known, unknown])
    auroc, fpr = detection(known, unknown)
    assert auroc == pytest.approx(roc_auc_score(labels, scores))
    false, true, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert fpr == pytest.approx(false[np.argmax(true >= 0.95)])


def test_auroc_and_fpr_and_energy_equal_pytorch_ood():
    from pytorch_ood.detector import EnergyBased
    from pytorch_ood.metrics import OODMetrics

    random = np.random.default_rng(0)
    known, unknown = random.normal(1, 1, 2000), random.normal(0, 1, 1000)
    metrics = OODMetrics()
    metrics.update(-torch.from_numpy(known), torch.zeros(2000, dtype=torch.int64))
    metrics.update(-torch.from_numpy(unknown), -torch.ones(1000, dtype=torch.int64))
    found = metrics.compute()
    assert detection(known, unknown) == pytest.approx((found["AUROC"], found["FPR95TPR"]), abs=2e-3)
    logits = torch.from_numpy(random.normal(size=(20, 5)))
    np.testing.assert_allclose(familiarity(logits.numpy(), np.zeros(5)), -EnergyBased.score(logits).numpy())


def split_of(counts, seed, shift=0.0):
    features, labels, _ = clusters(counts)
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(seed))
    return features + 0.05 * noise + shift, labels


def test_left_out_classes_are_renumbered_and_their_images_are_less_familiar():
    counts = [150, 120, 60, 40, 25, 15]
    splits = {"train": split_of(counts, 0), "validation": split_of([10] * 6, 1), "test": split_of([30] * 6, 2)}
    inner, out = leave_out(splits, 0.34, 0)
    assert len(out) == 60 and inner["train"][1].unique().tolist() == [0, 1, 2, 3]
    fit = fitted(inner, {"out": out}, 0)
    scores = unknown_scores(fit, {"test": inner["test"][0], "out": out})
    assert all(detection(each["test"], each["out"])[0] > 0.8 for each in scores.values())
    rows = set_rows(fitted(splits, {}, 0), splits)
    assert set(rows) == {"standard", "one threshold", "served", "a threshold per class"}
    assert all(row["all"] >= 0.8 and 1 <= round(row["size"], 9) <= 6 for row in rows.values())


def test_the_weight_of_an_own_quantile_is_chosen_without_test_images():
    counts = [150, 120, 60, 40, 25, 15]
    splits = {"train": split_of(counts, 0), "validation": split_of([10] * 6, 1), "test": split_of([30] * 6, 2)}
    fit = fitted(splits, {}, 0)
    rows = weight_rows(fit, splits)
    without = replace(fit, logits={name: values for name, values in fit.logits.items() if name != "test"})
    assert weight_rows(without, {"validation": splits["validation"]}) == rows and list(rows) == list(LEAST_WEIGHTS)
    sizes = [row["size"] for row in rows.values()]
    assert sizes == sorted(sizes)  # nine images are just enough for a quantile of their own, which is their least score


def test_the_smallest_sets_that_cover_each_group_are_chosen():
    def row(few, size):
        return {"many": 0.95, "few": few, "size": size}

    assert chosen_weight({0.0: row(0.88, 2), 0.25: row(0.891, 3), 0.5: row(0.95, 4)}) == 0.25
    assert chosen_weight({0.0: row(0.5, 2), 0.25: row(0.7, 3)}) == 0.25

"""Measures of benchmarks.answer_quality: AUROC and FPR95 against scikit-learn and pytorch-ood, and the classes left out."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score, roc_curve

from benchmarks.answer_quality import detection, fitted, leave_out, set_rows, unknown_scores
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
    assert all(row["all"] >= 0.8 and 1 <= row["size"] <= 6 for row in rows.values())

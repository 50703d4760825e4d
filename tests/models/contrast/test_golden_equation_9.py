"""Table 6: the GML loss with equal counts and queues is SupCon with the sum inside the logarithm (Eq. 9), in golden values."""

import math

import pytest
import torch

from models.contrast.crd import noise_contrastive_losses
from models.contrast.gml import ClassSegments, contrast_losses
from models.contrast.gml_reference import gml_loss
from models.contrast.supcon import supervised_losses
from tests.support.contrast_cases import TARGET, U

KEYS = torch.tensor([[1, 0], [0.6, 0.8], [0, 1], [-0.6, 0.8], [-0.8, 0.6], [0, -1]], dtype=torch.float64)
KEY_CLASS = torch.tensor([0, 0, 1, 1, 2, 2])
UNIFORM = torch.full((3,), 1 / 3, dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("tau", "rows", "mean", "total", "bound"),
    [
        (0.1, [0.02253786097812, 0.00004543141374], 0.011291646195934, 9.006484145815374, None),
        (0.5, [0.365348528246808, 0.182438392400252], 0.27389346032353, 2.893633190989566, 0.7536694149348376),
    ],
)
def test_the_gml_loss_of_equal_classes_has_the_golden_values_of_equation_9_and_keeps_its_bound(
    tau, rows, mean, total, bound
):
    similarity = U @ KEYS.T
    own = [gml_loss(similarity[i : i + 1], KEY_CLASS, TARGET[i : i + 1], UNIFORM, tau).item() for i in range(2)]
    assert own == pytest.approx(rows, rel=0, abs=1e-12)
    assert gml_loss(similarity, KEY_CLASS, TARGET, UNIFORM, tau).item() == pytest.approx(mean, rel=0, abs=1e-12)
    rows_outside = supervised_losses(similarity / tau, TARGET[:, None] == KEY_CLASS)
    assert (2 * rows_outside).mean().item() == pytest.approx(total, rel=0, abs=1e-12)  # two positives each
    outside = rows_outside.mean().item() - math.log(2)
    assert mean <= outside
    assert bound is None or outside == pytest.approx(bound, rel=0, abs=1e-12)


@pytest.mark.parametrize(("tau", "golden"), [(0.1, 0.19876745704252338), (0.5, 0.5064144092940094)])
def test_with_the_other_views_of_each_class_as_prior_the_gml_losses_are_supcon_with_the_sum_inside(tau, golden):
    degrees = torch.tensor([0, 20, 30, -40, 90, 60], dtype=torch.float64)  # two views of three images, by class
    views = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=1)
    label, ids = torch.tensor([0, 0, 0, 0, 1, 1]), torch.arange(6)
    segments = ClassSegments(label, torch.tensor([0, 4]), torch.tensor([4, 2]), 4)
    reference, one_pass = [], []
    for i in range(6):  # a call for each view, because the counts depend on its class
        query, others = views[i : i + 1] @ views.T, ids != i
        log_counts = torch.bincount(label[others]).double().log()
        reference.append(gml_loss(query, label, label[i : i + 1], log_counts, tau, mask=others[None]).item())
        losses = contrast_losses(
            query, segments, label[i : i + 1], log_counts, tau, query_ids=ids[i : i + 1], key_ids=ids
        )
        one_pass.append(losses.tau.item())
    assert sum(reference) / 6 == pytest.approx(golden, rel=0, abs=1e-12)
    assert sum(one_pass) / 6 == pytest.approx(golden, rel=0, abs=1e-12)


def test_the_scores_and_the_loss_of_one_direction_of_crd_are_golden():
    x = torch.tensor(
        [
            [0.495378953922134, 0.102554981879509, 0.010722780068279, 0.277842781386647],
            [0.457255249491514, 0.067548229696841, 0.015908610037530, 0.172788413517546],
        ],
        dtype=torch.float64,
    )
    losses = noise_contrastive_losses(x.log(), torch.zeros((), dtype=torch.float64), 5)
    assert losses.mean().item() == pytest.approx(1.2868476291036197, rel=0, abs=1e-10)

"""ConCutMix: its labels against the golden value, its boxes, and the images and labels of a step."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.contrast.supcon import BalancedContrast
from models.losses.class_loss import Mixed
from models.networks.projection_head import ProjectionHead
from models.objectives.concutmix import ConCutMixObjective, paste, semantic_labels
from models.objectives.student_weights import StudentWeights
from tests.support.small_objectives import LOG_PRIOR, gradient, images_seen_by, network, views

TARGET = torch.tensor([0, 2, 0, 1, 1, 2, 2, 0, 0, 1, 1, 2])  # of the batch and of the second one, alternating
LOG_COUNTS = torch.tensor([50.0, 12.0, 3.0]).log()


def test_the_labels_equal_the_golden_value():
    feature = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    centres = torch.tensor([[1.2, 1], [1, 4], [2, 5]], dtype=torch.float64)
    mixed = torch.tensor([[0.7, 0, 0.3]], dtype=torch.float64)
    log_counts = torch.tensor([5, 3, 2], dtype=torch.float64).log()
    labels = semantic_labels(feature, centres, mixed, log_counts, 20 / 255, 2)
    # The three values of a label sum to 1.
    assert labels[0].tolist() == pytest.approx([0.707727599353, 0.002033578777, 0.290238821870], rel=0, abs=1e-11)
    assert labels.sum().item() == pytest.approx(1)
    assert torch.equal(semantic_labels(feature, centres, mixed, log_counts, 0.0, 2), mixed)
    alone = semantic_labels(feature, centres, mixed, log_counts, 1e6, 2)  # the distances alone
    assert alone.min() >= 0 and alone.sum().item() == pytest.approx(1)


def test_the_share_of_the_label_is_the_area_that_is_left_and_half_of_the_images_stay_whole():
    random = torch.rand(4000, 4, generator=torch.Generator().manual_seed(0))
    images, partners = torch.zeros(4000, 1, 16, 16), torch.ones(4000, 1, 16, 16)
    mixed, share = paste(images, partners, random)
    assert torch.allclose(1 - mixed.mean((1, 2, 3)), share)
    whole = share == 1
    assert whole.float().mean().item() == pytest.approx(0.5, abs=0.05)
    # lambda is uniform; clipping at the borders leaves more of the image.
    assert 0.5 < share[~whole].mean().item() < 0.8
    box = paste(images[:1], partners[:1], torch.tensor([[0.75, 0.5, 0.5, 0.0]]))[0][0, 0]
    expected = F.pad(torch.ones(8, 8), (4, 4, 4, 4))
    assert torch.equal(box, expected)


def made(blend=0.5):
    torch.manual_seed(2)
    term = BalancedContrast(ProjectionHead(64, 64, 8), ProjectionHead(64, 64, 8), 0.1)
    weights = StudentWeights(2.0, 0.6, 0.0, 4.0, 1.0, 0.9)
    return ConCutMixObjective(
        network(), LOG_PRIOR, weights, term, log_counts=LOG_COUNTS, blend=blend, nearest=2, warm=0.5
    ).train()


def test_the_classifier_view_alone_is_mixed_with_images_of_the_second_batch():
    objective, batch = made(), views(3, 12)
    objective.begin_epoch(0, 2)
    seen = images_seen_by(objective.model)
    parts = objective(batch, TARGET, torch.arange(12))
    parts["loss"].backward()
    (images,) = seen
    own, second = batch[0, ::2], batch[0, 1::2]
    assert torch.equal(images[6:], batch[1:, ::2].flatten(0, 1))
    taken = (images[:6] == second).all(1)
    assert torch.equal(torch.where(taken[:, None], second, own), images[:6]) and 0 < taken.float().mean() < 1
    share = 1 - taken.float().mean((1, 2))
    logits = made().model(images)[1][:6] + 0.9 * LOG_PRIOR
    losses = [F.cross_entropy(logits, target, reduction="none") for target in (TARGET[::2], TARGET[1::2])]
    expected = (share * losses[0] + (1 - share) * losses[1]).mean().item()
    assert parts["classification"].item() == pytest.approx(expected, rel=1e-4)
    total = 2.0 * parts["classification"] + 0.6 * parts["contrast"]
    assert parts["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    assert gradient(objective.model.backbone) > 0 and gradient(objective.model.classifier) > 0


def test_the_labels_depend_on_the_features_after_the_warm_up_alone_and_each_step_draws_other_boxes():
    first, second = made(), made(blend=0.0)
    for epoch, equal in ((4, True), (5, False)):
        values = []
        for objective in (first, second):
            objective.begin_epoch(epoch, 10)
            values.append(objective(views(3, 12), TARGET, torch.arange(12))["classification"].item())
        assert math.isclose(*values, rel_tol=1e-6) == equal
    before = images_seen_by(second.model)
    second(views(3, 12), TARGET, torch.arange(12))
    second.after_step()
    second(views(3, 12), TARGET, torch.arange(12))
    assert not torch.equal(before[0], before[1])


def test_an_image_without_a_box_keeps_its_label():
    objective = made()
    objective.begin_epoch(5, 10)
    features, logits, target = torch.randn(2, 64), torch.randn(2, 3), torch.tensor([0, 1])
    losses = []
    for share in (1.0, 0.999):
        mixed = Mixed(torch.tensor([0, 1]), torch.full((2,), share))
        losses.append(objective.classification(features, logits, target, mixed).item())
    adjusted = logits + 0.9 * LOG_PRIOR
    assert losses[0] == pytest.approx(F.cross_entropy(adjusted, target).item(), rel=1e-6) != losses[1]


def test_a_resumed_run_draws_the_boxes_that_the_run_would_have_drawn():
    run, resumed = made(), made()
    run.begin_epoch(5, 10)
    run(views(3, 12), TARGET, torch.arange(12))
    run.after_step()
    resumed.load_state_dict(run.state_dict())
    resumed.begin_epoch(5, 10)
    first, second = (each(views(3, 12), TARGET, torch.arange(12))["loss"].item() for each in (run, resumed))
    assert first == second

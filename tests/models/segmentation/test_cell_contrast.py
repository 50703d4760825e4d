"""Cells: their labels, the sampled queries and keys, the queues, and the objective that combines the terms."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.contrast.gml_reference import gml_loss
from models.contrast.memories import counter_random
from models.contrast.queues import ClassQueues
from models.segmentation.cells import cell_labels, choose_keys, choose_queries
from models.segmentation.contrast import CellContrast
from models.segmentation.losses import pixel_cross_entropy
from models.segmentation.network import SegmentationModel
from models.segmentation.objective import SegmentationObjective, SegmentationWeights

COUNTS = [700, 200, 100]
LOG_PRIOR = torch.tensor([0.7, 0.2, 0.1]).log()


def random(shape, seed=0):
    return counter_random(torch.tensor(seed), shape)


@pytest.mark.parametrize(("pixels", "cells"), [((64, 48), (8, 6)), ((45, 61), (6, 8)), ((7, 9), (7, 9))])
def test_a_cell_has_the_label_of_its_centre_pixel(pixels, cells):
    labels = torch.randint(256, (3, *pixels), dtype=torch.uint8)
    expected = F.interpolate(labels[:, None], size=cells, mode="nearest-exact")[:, 0]
    assert torch.equal(cell_labels(labels, *cells), expected)


def test_queries_are_distinct_uniform_cells_with_a_class():
    labels = torch.randint(3, (2, 10, 10))
    labels[0, :5] = 255
    chosen = [choose_queries(labels, 50, random((200,), seed)) for seed in range(300)]
    assert all(len(set(cells.rows.tolist())) == 50 and cells.valid.all() for cells in chosen)
    times = torch.stack([cells.rows for cells in chosen]).flatten().bincount(minlength=200)
    assert times[labels.flatten() == 255].sum() == 0
    # Each of 150 cells is expected 100 times, with a deviation of 8.
    assert 60 < times[labels.flatten() != 255].min() <= times.max() < 140


def test_few_cells_are_repeated_and_no_cells_are_not_valid():
    labels = torch.full((1, 4, 4), 255)
    assert not choose_queries(labels, 8, random((16,))).valid.any()
    labels[0, 0, :3] = 1
    assert sorted(choose_queries(labels, 6, random((16,))).rows.tolist()) == [0, 0, 1, 1, 2, 2]


def test_keys_are_at_most_a_few_cells_of_each_class_in_each_image():
    labels = torch.randint(5, (3, 12, 12))
    labels[0, 3:] = 255
    labels[1][labels[1] == 2] = 0
    labels[1, 0, 0] = 2
    chosen = choose_keys(labels, 200, 4, random((2, labels.numel())))
    index = chosen.rows[chosen.valid].tolist()
    assert len(set(index)) == len(index)
    pairs = [(cell // 144, int(labels.flatten()[cell])) for cell in index]
    expected = {
        (image, c): min(4, int((labels[image] == c).sum())) for image in range(3) for c in range(5)
    }  # fmt: skip
    assert {pair: pairs.count(pair) for pair in expected} == expected
    limited = choose_keys(labels, 10, 4, random((2, labels.numel())))
    assert limited.valid.all() and len(limited.rows) == 10


def test_a_limited_number_of_keys_is_spread_over_classes():
    # Class 0 has nearly all cells; 8 of the 12 chosen cells are kept.
    labels = torch.zeros(1, 20, 20, dtype=torch.long)
    labels[0, 0, :4], labels[0, 1, :4] = 1, 2
    found = torch.zeros(3)
    for seed in range(200):
        found += labels.flatten()[choose_keys(labels, 8, 4, random((2, 400), seed)).rows].bincount(minlength=3)
    assert (found / found.sum() - 1 / 3).abs().max() < 0.04


def test_rows_that_are_not_valid_are_not_stored():
    torch.manual_seed(0)
    plain, masked = (ClassQueues(COUNTS, 20, 3, 4, torch.Generator().manual_seed(1)) for _ in range(2))
    for step in range(6):
        features, labels = torch.randn(12, 4), torch.randint(3, (12,))
        valid, ids = torch.rand(12) < 0.5, torch.arange(12) + 100 * step
        plain.enqueue(features[valid], labels[valid], ids[valid])
        masked.enqueue(features, labels, ids, valid)
        for name, value in plain.state_dict().items():
            assert torch.equal(value, masked.state_dict()[name]), name
    masked.enqueue(features, labels, ids + 999, torch.zeros(12, dtype=torch.bool))
    assert all(torch.equal(value, masked.state_dict()[name]) for name, value in plain.state_dict().items())


def contrast(**options):
    torch.manual_seed(3)
    options = {"queue_total": 40, "queue_minimum": 6, "queries": 30, "keys": 24, "projection_dim": 8, **options}
    return CellContrast(16, 16, COUNTS, **options)


def maps():
    torch.manual_seed(1)
    features, labels = torch.randn(2, 16, 6, 8, requires_grad=True), torch.randint(3, (2, 24, 32), dtype=torch.uint8)
    labels[0, :12] = 255
    return features, labels


def test_the_loss_of_cells_equals_equation_10_on_the_chosen_cells():
    module, (features, labels) = contrast(prior_strength=0.2), maps()
    ids = torch.tensor([5, 9])
    numbers = counter_random(module.steps, (3, 96))
    loss = module(features, features, labels, ids, LOG_PRIOR)
    loss.backward()
    own = cell_labels(labels, 6, 8).flatten()
    index = choose_queries(own.view(2, 6, 8), 30, numbers[2]).rows
    rows = features.permute(0, 2, 3, 1).reshape(-1, 16)
    query, keys = module.query_head(rows[index]), module.key_head(module.queues.features)
    expected = gml_loss(query @ keys.T, module.queues.row_class, own[index].long(), LOG_PRIOR, 0.07, 0.2)
    torch.testing.assert_close(loss, expected)
    stored = module.queues.sample_ids >= 0
    assert 0.2 < stored.double().mean() < 0.7
    # A stored row holds the feature of a cell of its class, in its image.
    for row in stored.nonzero().flatten().tolist():
        match = (rows.detach() == module.queues.features[row]).all(1).nonzero().item()
        assert own[match] == module.queues.row_class[row]
        assert ids[match // 48] == module.queues.sample_ids[row]
    assert features.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_an_image_without_labels_has_no_contrast():
    module, (features, labels) = contrast(), maps()
    loss = module(features, features, torch.full_like(labels, 255), torch.tensor([0, 1]), LOG_PRIOR)
    loss.backward()
    assert loss.item() == 0
    assert features.grad.abs().sum() == 0
    assert module.queues.fill() == 0


@pytest.mark.parametrize("encoder", ["teacher", "self"])
def test_the_objective_is_the_weighted_sum_of_its_terms(encoder):
    torch.manual_seed(0)
    model, teacher = SegmentationModel("resnet20", 3), SegmentationModel("resnet20", 3)
    cells = CellContrast(64, 64, COUNTS, queue_total=40, queue_minimum=6, queries=30, keys=24, projection_dim=8)
    weights = SegmentationWeights(beta=0.5, adjustment=0.2)
    objective = SegmentationObjective(model, LOG_PRIOR, weights, cells, teacher if encoder == "teacher" else None)
    objective.train()
    images, labels = torch.randn(1, 2, 3, 24, 32), torch.randint(3, (2, 24, 32), dtype=torch.uint8)
    parts = objective(images, labels, torch.arange(2))
    assert parts["loss"].item() == pytest.approx(
        (parts["classification"] + 0.4 * parts["auxiliary"] + 0.5 * parts["gml"]).item(), rel=1e-6
    )
    parts["loss"].backward()
    assert all(parameter.grad is not None for parameter in objective.parameters() if parameter.requires_grad)
    stored = cells.queues.features[cells.queues.sample_ids >= 0]
    source = teacher if encoder == "teacher" else model
    assert teacher.training == (encoder == "self")
    if encoder == "teacher":
        rows = source(images[0]).features.permute(0, 2, 3, 1).flatten(0, 2)
        assert (stored[:, None] - rows).abs().sum(2).min(1).values.max() < 1e-3
    assert objective.observations()["queue_fill"] == pytest.approx(len(stored) / 40)


def test_a_teacher_has_no_contrast_and_plain_cross_entropy_has_no_prior():
    torch.manual_seed(0)
    model = SegmentationModel("resnet20", 3, classifier="linear")
    objective = SegmentationObjective(model, LOG_PRIOR, SegmentationWeights(adjustment=0.0, auxiliary=0.0)).train()
    model.decode_head.dropout.p = 0.0
    images, labels = torch.randn(1, 2, 3, 24, 32), torch.randint(3, (2, 24, 32), dtype=torch.uint8)
    parts = objective(images, labels, torch.arange(2))
    expected = pixel_cross_entropy(model(images[0]).logits, labels, torch.zeros(3), 0.0)
    torch.testing.assert_close(parts["loss"], expected)
    assert list(parts) == ["loss", "classification"]
    with pytest.raises(ValueError, match="contrast is None"):
        SegmentationObjective(model, LOG_PRIOR, SegmentationWeights(beta=1.0))


def test_random_cells_resume_with_the_state_of_the_module():
    first, (features, labels) = contrast(), maps()
    first(features, features, labels, torch.tensor([0, 1]), LOG_PRIOR)
    second = contrast(generator=torch.Generator().manual_seed(9))
    second.load_state_dict(first.state_dict())
    losses = [module(features, features, labels, torch.tensor([0, 1]), LOG_PRIOR).item() for module in (first, second)]
    assert losses[0] == losses[1] and np.isfinite(losses[0])

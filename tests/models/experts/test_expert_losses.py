"""Losses of several experts: properties, and slow references by loops over images and experts."""

import pytest
import torch
import torch.nn.functional as F

from models.experts.backbone import expert_backbone
from models.experts.losses import (
    diversity_temperatures,
    mutual_divergence,
    ncl_loss,
    reslt_groups,
    reversed_log_prior,
    ride_diversity,
)
from models.losses.class_loss import Mixed
from models.networks.backbones import build_backbone
from models.networks.cosine_classifier import ImageClassifier, LinearClassifier
from models.objectives.experts import BbnObjective, ExpertsObjective, Ncl, Reslt, expert_logits

COUNTS = torch.tensor([2, 50, 7, 50])


@pytest.fixture
def logits():
    return torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_equal_experts_have_no_diversity(logits):
    equal = logits[:, :1].expand(-1, 3, -1)
    assert mutual_divergence(equal).item() == pytest.approx(0, abs=1e-12)
    assert ride_diversity(equal, torch.ones(4)).item() == pytest.approx(0, abs=1e-12)
    assert mutual_divergence(logits) > 0 and ride_diversity(logits, torch.ones(4)) > 0


def test_the_mutual_divergence_is_that_of_all_ordered_pairs(logits):
    p = logits.softmax(2)
    pairs = [(p[:, j] * (p[:, j] / p[:, k]).log()).sum(1).mean().item() for j in range(3) for k in range(3) if j != k]
    assert mutual_divergence(logits).item() == pytest.approx(sum(pairs) / 2)


def test_the_hard_classes_are_the_own_class_and_those_with_the_highest_logits_of_the_first_expert(logits):
    target = torch.tensor([0, 1, 2, 3, 0])
    log_counts = COUNTS.double().log()
    slow = 0.0
    for each, label in zip(logits, target.tolist(), strict=True):
        others = [c for c in each[0].argsort(descending=True).tolist() if c != label]
        kept = torch.zeros(4, dtype=torch.float64)
        kept[[label, *others[:1]]] = 1
        for expert in each:
            slow += F.cross_entropy(expert + log_counts, torch.tensor(label)).item() / 5
            slow += F.cross_entropy((expert + log_counts) * kept, torch.tensor(label)).item() / 5
    assert ncl_loss(logits, target, log_counts, 2, 0.0).item() == pytest.approx(slow)


def test_each_class_gets_the_prior_of_the_class_of_opposite_rank():
    log_prior = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    assert torch.allclose(reversed_log_prior(log_prior).exp(), torch.tensor([0.5, 0.1, 0.25, 0.15]))
    assert torch.equal(reversed_log_prior(reversed_log_prior(log_prior)), log_prior)


def test_the_branches_of_reslt_leave_out_the_largest_classes_in_any_order():
    assert reslt_groups(COUNTS, (0.25, 0.75)).tolist() == [[1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 0, 0]]


def test_larger_classes_have_a_higher_temperature_of_the_diversity():
    temperatures = diversity_temperatures(torch.tensor([0.1, 0.6, 0.3]), 0.5)
    assert temperatures.argsort().tolist() == [0, 2, 1] and temperatures.max() == 1
    assert torch.equal(diversity_temperatures(torch.tensor([0.1, 0.9]), 0.0), torch.ones(2))


def test_the_logits_of_a_network_are_the_mean_of_its_experts():
    model = ImageClassifier(expert_backbone("resnet20", 2, "nothing"), 4, 0.1).eval()
    images = torch.rand(3, 3, 8, 8)
    assert torch.allclose(model(images)[1], expert_logits(model, images).mean(1), atol=1e-5)


def test_the_logits_of_a_network_with_branches_on_the_feature_map_are_their_sum():
    model = ImageClassifier(expert_backbone("resnet20", 3, "map"), 4, 1 / 3, head=LinearClassifier).eval()
    images = torch.rand(3, 3, 8, 8)
    experts = expert_logits(model, images)
    assert torch.allclose(model(images)[1], experts.sum(1), atol=1e-5)
    branch = model.backbone.network(images)[:, 1]
    assert torch.allclose(experts[:, 1], F.linear(branch, model.classifier.weight, model.classifier.bias), atol=1e-6)


def test_every_weight_of_a_network_with_experts_has_a_gradient():
    torch.manual_seed(0)
    networks = [
        (
            ImageClassifier(expert_backbone("resnet20", 3, "map"), 4, 1 / 3, head=LinearClassifier),
            Reslt(COUNTS, (0.25, 0.75), 0.9),
        ),
        (ImageClassifier(expert_backbone("resnet20", 2, "early"), 4, 0.1), Ncl(COUNTS.log(), 2, 0.6)),
    ]
    for model, loss in networks:
        objective = ExpertsObjective(model, loss)
        objective(torch.rand(1, 8, 3, 8, 8), torch.arange(8) % 4, torch.arange(8))["loss"].backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_mixed_images_are_refused():
    objective = ExpertsObjective(ImageClassifier("resnet20", 4, 0.1), Ncl(COUNTS.log(), 2, 0.6))
    with pytest.raises(ValueError, match="one label per image"):
        objective(torch.rand(1, 2, 3, 8, 8), torch.arange(2), torch.arange(2), Mixed(torch.arange(2), torch.ones(2)))


def test_bbn_learns_from_each_batch_with_its_branch_and_is_used_with_equal_weights():
    torch.manual_seed(0)
    model = ImageClassifier(expert_backbone("resnet20", 2, "late"), 4, 1.0, head=LinearClassifier)
    objective, images = BbnObjective(model, -1.0), torch.rand(1, 8, 3, 8, 8)

    def gradients(epoch):
        objective.zero_grad()
        objective.begin_epoch(epoch, 4)
        objective(images, torch.arange(8) % 4, torch.arange(8))["loss"].backward()
        return [
            sum(p.grad.abs().sum() for p in branch.parameters()).item() for branch in model.backbone.network.branches
        ]

    first, second = gradients(0)
    assert first > 0 and second == 0
    assert all(gradients(2))
    model.eval()
    features = model.backbone.network(images[0]).flatten(1)
    assert torch.allclose(model(images[0])[1], model.classifier(features), atol=1e-6)


def test_the_branches_of_bbn_are_the_last_block():
    plain, bbn = build_backbone("resnet32"), expert_backbone("resnet32", 2, "late")
    assert sum(p.numel() for p in bbn.parameters()) - sum(p.numel() for p in plain.parameters()) == 73_984
    assert expert_backbone("torchvision/resnet18", 2, "late").feature_dim == 2 * 512

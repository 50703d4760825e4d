"""The student's objective with each contrast term: its views, what gets a gradient, what it equals, when memory changes."""

import copy

import pytest
import torch

from models.contrast.crd import CRD
from models.contrast.kcl import KPositiveContrast
from models.contrast.memories import FifoQueue
from models.contrast.paco import GPaCo, PaCo
from models.contrast.proco import ProCo
from models.contrast.supcon import BalancedContrast, SupCon
from models.contrast.terms import ContrastInputs
from models.distributed import rank, rank_count
from models.losses.adjusted_cross_entropy import adjusted_cross_entropy
from models.losses.distillation import distillation_loss
from models.networks.projection_head import ProjectionHead
from models.objectives.contrast import ContrastObjective
from models.objectives.student_weights import StudentWeights
from tests.support.small_objectives import (
    BATCH,
    IDS,
    LOG_PRIOR,
    TARGET,
    descend,
    gradient,
    images_seen_by,
    network,
    views,
)
from tests.support.small_training import in_ranks

DIM, SAMPLES = 8, 200
VIEWS = {"supcon": 3, "bcl": 3, "proco": 3, "gpaco": 2, "paco": 2, "kcl": 2, "crd": 1}


def term(kind):
    torch.manual_seed(2)
    heads = [ProjectionHead(64, 64, DIM) for _ in range(2)]
    queue = FifoQueue(2 * BATCH, DIM)
    labels = torch.arange(SAMPLES) % 3
    labels[IDS] = TARGET
    return {
        "supcon": lambda: SupCon(heads[0], 0.1),
        "bcl": lambda: BalancedContrast(*heads, 0.1),
        "proco": lambda: ProCo(heads[0], LOG_PRIOR, DIM, 0.1),
        "gpaco": lambda: GPaCo(heads[0], LOG_PRIOR, queue, 0.1),
        "paco": lambda: PaCo(heads[0], LOG_PRIOR, queue, 0.1),
        "kcl": lambda: KPositiveContrast(heads[0], queue, 0.1),
        "crd": lambda: CRD(64, 64, labels, dim=DIM, negatives=16),
    }[kind]()


def made(kind, *, momentum=0.9, adjustment=None, **weights):
    chosen = {
        "gamma": 0.7,
        "beta": 1.5,
        "alpha": 0.0,
        "distillation_temperature": 4.0,
        "prior_strength": 1.0,
        **weights,
    }
    return ContrastObjective(
        network(), network(seed=1), LOG_PRIOR, StudentWeights(**chosen), term(kind), encoder_momentum=momentum,
        teacher_adjustment=adjustment,
    ).train()  # fmt: skip


@pytest.mark.parametrize("kind", VIEWS)
def test_each_term_trains_network_and_heads_and_the_parts_sum_to_the_loss(kind):
    objective = made(kind, alpha=2.0)
    objective.begin_epoch(0, 2)
    parts = objective(views(objective.views), TARGET, IDS)
    parts["loss"].backward()
    assert objective.views == VIEWS[kind] and next(iter(parts)) == "loss"
    total = 0.7 * parts["classification"] + 1.5 * parts["contrast"] + 2.0 * parts["distillation"]
    assert parts["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    assert gradient(objective.model.backbone) > 0 and gradient(objective.model.classifier) > 0
    head = objective.term.student_head if kind == "crd" else objective.term.head
    assert gradient(head) > 0 and gradient(objective.teacher) == 0
    assert not any(parts[name].requires_grad for name in parts if name != "loss")


@pytest.mark.parametrize("kind", VIEWS)
def test_the_term_sees_the_features_of_its_views(kind):
    objective, batch = made(kind), views(VIEWS[kind])
    objective.begin_epoch(0, 2)
    reference, model, teacher = term(kind).train(), network().train(), network(seed=1).eval()
    reference.begin_epoch(0, 2)
    students = batch[: VIEWS[kind] - (kind in ("paco", "kcl"))]
    features, logits = model(students.flatten(0, 1))
    features, logits = features.unflatten(0, (-1, BATCH)), logits.unflatten(0, (-1, BATCH))
    queries = slice(1, None) if kind in ("supcon", "bcl", "proco") else slice(None)
    key = copy.deepcopy(network().backbone).train()(batch[-1]) if kind in ("paco", "kcl") else teacher(batch[0])[0]
    given = ContrastInputs(features[queries], TARGET, IDS, key.detach(), logits[queries], model.classifier.weight)
    parts = objective(batch, TARGET, IDS)
    assert parts["contrast"].item() == pytest.approx(reference(given)["loss"].item(), rel=1e-5)
    assert parts["classification"].item() == pytest.approx(
        adjusted_cross_entropy(logits[0], TARGET, LOG_PRIOR).item(), rel=1e-5
    )


@pytest.mark.parametrize("kind", ["paco", "gpaco", "kcl", "crd"])
def test_memory_changes_after_the_step_and_not_before(kind):
    objective = made(kind)
    memory = objective.term.memory if kind == "crd" else objective.term.queue.features
    before = memory.clone()
    objective(views(objective.views), TARGET, IDS)["loss"].backward()
    assert torch.equal(memory, before)
    objective.after_step()
    assert not torch.equal(memory, before)


@pytest.mark.parametrize("kind", ["paco", "kcl"])
def test_the_momentum_encoder_and_the_key_head_follow_the_student(kind):
    objective = made(kind, momentum=0.75)
    pairs = [
        *zip(objective.momentum_encoder.parameters(), objective.model.backbone.parameters(), strict=True),
        *zip(objective.term.key_head.parameters(), objective.term.head.parameters(), strict=True),
    ]
    expected = [follower.clone() for follower, _ in pairs]
    descend(objective)
    for start, (follower, followed) in zip(expected, pairs, strict=True):
        assert torch.allclose(follower, 0.75 * start + 0.25 * followed, rtol=1e-5, atol=1e-7)
        assert follower.grad is None and not follower.requires_grad


def test_crd_and_distillation_share_one_pass_of_the_teacher():
    objective = made("crd", alpha=2.0, adjustment=0.0)
    seen = images_seen_by(objective.teacher)
    parts = objective(views(1), TARGET, IDS)
    assert [len(images) for images in seen] == [BATCH]
    model, teacher = network().train(), network(seed=1).eval()
    logits, taught = model(views(1)[0])[1], teacher(views(1)[0])[1] - LOG_PRIOR
    assert parts["distillation"].item() == pytest.approx(distillation_loss(logits, taught, 4.0).item(), rel=1e-5)


@pytest.mark.parametrize(("kind", "needed"), [("crd", True), ("supcon", False), ("paco", False)])
def test_the_teacher_is_stored_if_needed_and_a_missing_one_raises_an_error(kind, needed):
    assert (made(kind).teacher is not None) == needed
    weights = StudentWeights(1.0, 1.0, 0.0 if needed else 1.0, 4.0, 1.0)
    with pytest.raises(ValueError, match="teacher is None"):
        ContrastObjective(network(), None, LOG_PRIOR, weights, term(kind))


@pytest.mark.parametrize(("kind", "trained"), [("supcon", False), ("kcl", False), ("paco", True), ("gpaco", True)])
def test_without_gamma_and_alpha_only_a_term_of_the_logits_trains_the_classifier(kind, trained):
    objective = made(kind, gamma=0.0)
    parts = objective(views(objective.views), TARGET, IDS)
    parts["loss"].backward()
    assert "classification" not in parts
    assert objective.model.classifier.weight.requires_grad == trained == (gradient(objective.model.classifier) > 0)


def test_proco_uses_the_means_of_this_epoch_and_the_one_before():
    objective = made("proco")
    for epoch in range(3):
        objective.begin_epoch(epoch, 3)
        descend(objective)
    assert objective.term.moments.counts.sum(1).tolist() == [2.0 * BATCH, 2.0 * BATCH]


def step_of_a_share(kind):
    """Loss, gradient of the classifier and memory of a step on this rank's share of the batch, without batch statistics."""
    objective = made(kind)
    for module in objective.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    size = BATCH // rank_count()
    own = slice(rank() * size, (rank() + 1) * size)
    loss = objective(views(VIEWS[kind])[:, own], TARGET[own], IDS[own])["loss"]
    loss.backward()
    objective.after_step()
    memory = objective.term.queue.features if kind == "gpaco" else objective.term.memory
    return loss.detach(), objective.model.classifier.weight.grad / rank_count(), memory


@pytest.mark.parametrize("kind", ["gpaco", "crd"])
def test_two_ranks_have_the_loss_the_gradient_and_the_memory_of_one_process(kind, tmp_path):
    loss, gradient_, memory = step_of_a_share(kind)
    parts = in_ranks(step_of_a_share, tmp_path, kind)
    torch.testing.assert_close(sum(part[0] for part in parts) / 2, loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sum(part[1] for part in parts), gradient_, rtol=1e-3, atol=1e-5)
    for part in parts:
        torch.testing.assert_close(part[2], memory, rtol=1e-4, atol=1e-5)

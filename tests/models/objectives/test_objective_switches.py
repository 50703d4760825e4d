"""The student's objective with disabled terms, and with contrast features of a momentum encoder, without a teacher."""

import copy

import pytest
import torch

import models.losses.class_loss
from models.contrast.gml_reference import gml_loss
from models.losses.adjusted_cross_entropy import adjusted_cross_entropy
from models.losses.distillation import distillation_loss
from models.objectives.student import StudentObjective
from models.objectives.student_weights import StudentWeights
from models.objectives.teacher import TeacherObjective
from tests.support.small_objectives import (
    BATCH,
    COUNTS,
    IDS,
    LOG_PRIOR,
    TARGET,
    descend,
    gradient,
    images_seen_by,
    network,
    student,
    views,
)


def test_without_contrast_one_view_is_enough_and_nothing_is_built_for_it():
    objective = student(weights={"beta": 0.0})
    seen, taught = images_seen_by(objective.model), images_seen_by(objective.teacher)
    parts = objective(views(1), TARGET, IDS)
    parts["loss"].backward()
    assert objective.views == 1 and set(parts) == {"loss", "classification", "distillation"}
    assert [len(images) for images in seen] == [len(images) for images in taught] == [BATCH]
    assert not any(
        name.startswith(("query_head", "key_head", "queues", "log_tau_g")) for name in objective.state_dict()
    )
    assert objective.undecayed() == [] and objective.batch_modules() == [objective.model]
    reference, teacher = network(), network(seed=1).eval()
    logits = reference(views(1)[0])[1]
    total = 0.7 * adjusted_cross_entropy(logits, TARGET, LOG_PRIOR)
    total += 2.0 * distillation_loss(logits, teacher(views(1)[0])[1], 4.0)
    assert parts["loss"].item() == pytest.approx(total.item(), rel=1e-6)


def test_classification_alone_is_what_a_teacher_learns_from_and_keeps_no_teacher():
    objective = student(weights={"gamma": 1.0, "beta": 0.0, "alpha": 0.0})
    parts = objective(views(1), TARGET, IDS)
    assert torch.equal(parts["loss"], TeacherObjective(network(), LOG_PRIOR)(views(1), TARGET, IDS)["loss"])
    assert objective.teacher is None and set(parts) == {"loss", "classification"} and objective.views == 1
    objective.train().eval()


def test_without_gamma_the_cross_entropy_is_not_computed_and_the_classifier_learns_by_distillation(monkeypatch):
    monkeypatch.setattr(models.losses.class_loss, "adjusted_cross_entropy", None)
    objective = student(weights={"gamma": 0.0})
    parts = objective(views(), TARGET, IDS)
    parts["loss"].backward()
    assert "classification" not in parts and gradient(objective.model.classifier) > 0
    total = 1.5 * (parts["gml"] + parts["tau"]) + 2.0 * parts["distillation"]
    assert parts["loss"].item() == pytest.approx(total.item(), rel=1e-6)


@pytest.mark.parametrize("term", ["gamma", "beta", "alpha"])
def test_a_term_switched_off_leaves_the_others_as_they_were(term):
    whole, without = student(), student(weights={term: 0.0})
    parts, remaining = whole(views(), TARGET, IDS), without(views(), TARGET, IDS)
    removed = {
        "gamma": {"classification"},
        "beta": {"gml", "tau", "tau_g", "queries_without_keys"},
        "alpha": {"distillation"},
    }
    assert set(parts) - set(remaining) == removed[term]
    for name in set(remaining) - {"loss"}:
        # Without the query view in the batch, the classifier view has other batch-norm statistics.
        assert term == "beta" or torch.equal(remaining[name], parts[name]), name


def test_a_classifier_that_no_term_trains_is_frozen_for_a_second_stage():
    objective = student(weights={"gamma": 0.0, "alpha": 0.0})
    objective(views(), TARGET, IDS)["loss"].backward()
    assert gradient(objective.model.classifier) == 0 and gradient(objective.model.backbone) > 0
    assert not objective.model.classifier.weight.requires_grad


@pytest.mark.parametrize(
    ("weights", "encoder", "needed"),
    [
        ({}, "teacher", True),
        ({"alpha": 0.0}, "teacher", True),
        ({"alpha": 0.0, "beta": 0.0}, "teacher", False),
        ({}, "momentum", True),
        ({"alpha": 0.0}, "momentum", False),
    ],
)
def test_the_teacher_is_stored_if_needed_and_a_missing_one_raises_an_error(weights, encoder, needed):
    objective = student(weights=weights, contrast_encoder=encoder)
    assert (objective.teacher is not None) == needed
    assert any(name.startswith("teacher.") for name in objective.state_dict()) == needed
    chosen = {"gamma": 0.7, "beta": 1.5, "alpha": 2.0, **weights}
    chosen = StudentWeights(**chosen, distillation_temperature=4.0, prior_strength=1.0)
    assert chosen.needs_teacher(encoder) == needed
    if needed:
        with pytest.raises(ValueError, match="teacher is None"):
            StudentObjective(
                network(), None, LOG_PRIOR, COUNTS, chosen, tau_g=0.2, train_tau_g=True, queue_total=16, queue_minimum=2,
                projection_dim=8, contrast_encoder=encoder,
            )  # fmt: skip


def without_teacher(momentum=0.9, **weights):
    return student(
        weights={"alpha": 0.0, **weights}, contrast_encoder="momentum", encoder_momentum=momentum
    )  # fmt: skip


def test_the_momentum_encoder_starts_as_the_student_and_follows_it_with_its_key_head_after_each_step():
    objective = without_teacher(momentum=0.75)
    pairs = [
        *zip(objective.momentum_encoder.parameters(), objective.model.backbone.parameters(), strict=True),
        *zip(objective.key_head.parameters(), objective.query_head.parameters(), strict=True),
    ]
    assert all(torch.equal(follower, followed) for follower, followed in pairs)
    expected = [follower.clone() for follower, _ in pairs]
    for _ in range(3):
        descend(objective)
        expected = [0.75 * mean + 0.25 * followed.detach() for mean, (_, followed) in zip(expected, pairs, strict=True)]
    for mean, (follower, followed) in zip(expected, pairs, strict=True):
        assert torch.allclose(follower, mean, rtol=1e-5, atol=1e-7)
        assert follower.grad is None and not follower.requires_grad and followed.requires_grad
    assert not torch.allclose(expected[0], pairs[0][1])


def test_momentum_features_are_stored_under_their_own_label_and_image():
    # The official code shuffles the images but not their labels and ids, so its stored pairs do not match.
    objective = without_teacher()
    reference = copy.deepcopy(objective.momentum_encoder)
    objective(views(), TARGET, IDS)
    expected = reference(views()[2])
    rows = {int(i): row for row, i in enumerate(objective.queues.sample_ids) if i >= 0}
    assert set(rows) == set(IDS.tolist())
    for position, (sample, label) in enumerate(zip(IDS.tolist(), TARGET.tolist(), strict=True)):
        assert torch.allclose(objective.queues.features[rows[sample]], expected[position], rtol=1e-4, atol=1e-6)
        assert objective.queues.row_class[rows[sample]] == label


def test_gml_without_teacher_equals_its_definition_and_trains_the_query_side_alone():
    objective = without_teacher()
    descend(objective)  # differs from the student, as after the first step
    model, encoder = copy.deepcopy(objective.model), copy.deepcopy(objective.momentum_encoder)
    query_head, key_head, queues = (
        copy.deepcopy(m) for m in (objective.query_head, objective.key_head, objective.queues)
    )
    tau_g = objective.log_tau_g.exp().item()
    objective.zero_grad()
    parts = objective(views(), TARGET, IDS)
    parts["loss"].backward()

    features, _ = model(torch.cat([views()[0], views()[1]]))
    queues.enqueue(encoder(views()[2]).detach(), TARGET, IDS)
    similarity = query_head(features[BATCH:]) @ key_head(queues.features).T
    expected = gml_loss(similarity, queues.row_class, TARGET, LOG_PRIOR, tau_g, 0.5)
    assert parts["gml"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert gradient(objective.query_head) > 0 and gradient(objective.model) > 0
    assert gradient(objective.key_head) == gradient(objective.momentum_encoder) == 0
    assert objective.teacher is None and set(parts) >= {"classification", "gml", "tau", "tau_g"}


def test_beside_a_momentum_encoder_the_teacher_sees_the_classifier_view_alone():
    objective = student(contrast_encoder="momentum")
    seen, encoded = images_seen_by(objective.teacher), images_seen_by(objective.momentum_encoder)
    assert "distillation" in objective(views(), TARGET, IDS)
    assert len(seen) == len(encoded) == 1
    assert torch.equal(seen[0], views()[0]) and torch.equal(encoded[0], views()[2])


def test_the_momentum_encoder_is_state_that_a_resumed_run_gets_back():
    objective, resumed = without_teacher(), without_teacher()
    for _ in range(2):
        descend(objective)
    resumed.load_state_dict(objective.state_dict())
    for one in (objective, resumed):
        descend(one)
    assert any(name.startswith("momentum_encoder.") for name in objective.state_dict())
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in objective.state_dict().items())


@pytest.mark.parametrize(
    ("weights", "switches"),
    [
        ({}, {}),
        ({"alpha": 0.0}, {"contrast_encoder": "momentum"}),
        ({}, {"contrast_encoder": "momentum", "train_tau_g": False}),
        ({"beta": 0.0}, {}),
        ({"gamma": 0.0}, {}),
        ({"beta": 0.0, "alpha": 0.0}, {}),
    ],
)
def test_a_step_has_static_shapes_and_reads_nothing_back_to_the_host(weights, switches):
    # The meta device has shapes without values: reading a value, or a shape that depends on one, fails.
    objective = student(weights=weights, **switches).to("meta")
    meta = [tensor.to("meta") for tensor in (views(objective.views), TARGET, IDS)]
    parts = objective(*meta)
    parts["loss"].backward()
    objective.after_step()
    assert all(part.shape == () and part.is_meta for part in parts.values())
    with pytest.raises((RuntimeError, NotImplementedError)):
        parts["loss"].item()

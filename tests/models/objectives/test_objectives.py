"""A step of teacher and student training: computed losses, changed state, unchanged state."""

import copy

import pytest
import torch

from models.contrast.gml_reference import gml_loss, other_sample_mask
from models.losses.adjusted_cross_entropy import adjusted_cross_entropy
from models.losses.distillation import distillation_loss
from models.objectives.teacher import TeacherObjective
from tests.support.small_objectives import (
    BATCH,
    IDS,
    LOG_PRIOR,
    TARGET,
    gradient,
    images_seen_by,
    network,
    student,
    views,
)


def test_the_teachers_loss_is_the_adjusted_cross_entropy_of_its_one_view():
    objective = TeacherObjective(network(), LOG_PRIOR).train()
    reference = copy.deepcopy(objective.model)
    parts = objective(views(1), TARGET, IDS)
    expected = adjusted_cross_entropy(reference(views(1)[0])[1], TARGET, LOG_PRIOR)
    assert torch.equal(parts["loss"], expected) and not parts["classification"].requires_grad
    assert objective.views == 1 and objective.undecayed() == []
    before = copy.deepcopy(objective.state_dict())
    objective.after_step()
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())


def test_every_term_and_the_total_equal_their_definition_step_by_step():
    objective = student()
    model, teacher = copy.deepcopy(objective.model), copy.deepcopy(objective.teacher)
    query_head, key_head, queues = (
        copy.deepcopy(m) for m in (objective.query_head, objective.key_head, objective.queues)
    )
    parts = objective(views(), TARGET, IDS)

    classifier_view, query_view, key_view = views()
    features, logits = model(torch.cat([classifier_view, query_view]))
    _, teacher_logits = teacher(classifier_view)
    queues.enqueue(teacher(key_view)[0], TARGET, IDS)
    similarity = query_head(features[BATCH:]) @ key_head(queues.features).T
    terms = {
        "classification": adjusted_cross_entropy(logits[:BATCH], TARGET, LOG_PRIOR),
        "gml": gml_loss(similarity, queues.row_class, TARGET, LOG_PRIOR, 0.2, 0.5),
        "tau": gml_loss(
            similarity, queues.row_class, TARGET, LOG_PRIOR, 0.2, 0.5, other_sample_mask(IDS, queues.sample_ids)
        ),
        "distillation": distillation_loss(logits[:BATCH], teacher_logits, 4.0),
    }
    for name, value in terms.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-5), name
    total = 0.7 * terms["classification"] + 1.5 * (terms["gml"] + terms["tau"]) + 2.0 * terms["distillation"]
    assert parts["loss"].item() == pytest.approx(total.item(), rel=1e-5)
    assert parts["tau_g"].item() == pytest.approx(0.2)
    assert torch.equal(objective.queues.sample_ids, queues.sample_ids)
    assert [name for name, part in parts.items() if part.requires_grad] == ["loss"]


def test_a_step_leaves_the_teacher_exactly_as_it_was_and_in_eval_mode():
    objective = student()
    assert objective.training and objective.model.training and not objective.teacher.training
    assert not any(module.training for module in objective.teacher.modules())
    before = copy.deepcopy(objective.teacher.state_dict())
    for _ in range(2):
        objective.zero_grad()
        objective(views(), TARGET, IDS)["loss"].backward()
        with torch.no_grad():
            for parameter in objective.parameters():
                if parameter.requires_grad:
                    parameter -= 0.1 * parameter.grad + 0.01 * parameter
    assert all(torch.equal(value, before[name]) for name, value in objective.teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in objective.teacher.parameters())


def test_one_step_reaches_student_both_heads_and_the_temperature():
    objective = student()
    objective(views(), TARGET, IDS)["loss"].backward()
    for part in (objective.model.backbone, objective.model.classifier, objective.query_head, objective.key_head):
        assert gradient(part) > 0
    assert objective.log_tau_g.grad.abs() > 0


def test_the_temperature_learns_from_l_tau_alone_and_the_encoders_not_from_it():
    objective = student()
    queues = copy.deepcopy(objective.queues)
    plain = copy.deepcopy(objective)
    objective(views(), TARGET, IDS)["loss"].backward()

    queues.enqueue(objective.teacher(views()[2])[0], TARGET, IDS)
    features, _ = plain.model(torch.cat([views()[0], views()[1]]))
    similarity = (plain.query_head(features[BATCH:]) @ plain.key_head(queues.features).T).detach()
    log_tau = torch.tensor(0.2).log().requires_grad_()
    mask = other_sample_mask(IDS, queues.sample_ids)
    (1.5 * gml_loss(similarity, queues.row_class, TARGET, LOG_PRIOR, log_tau.exp(), 0.5, mask)).backward()
    assert objective.log_tau_g.grad.item() == pytest.approx(log_tau.grad.item(), rel=1e-3)

    fixed = student(train_tau_g=False)
    fixed(views(), TARGET, IDS)["loss"].backward()
    pairs = zip(objective.key_head.parameters(), fixed.key_head.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-7) for a, b in pairs)


def test_a_fixed_temperature_has_no_gradient_and_no_part_of_its_own():
    objective = student(train_tau_g=False)
    parts = objective(views(), TARGET, IDS)
    parts["loss"].backward()
    assert objective.log_tau_g.grad is None and "tau" not in parts and "queries_without_keys" not in parts
    total = 0.7 * parts["classification"] + 1.5 * parts["gml"] + 2.0 * parts["distillation"]
    assert parts["loss"].item() == pytest.approx(total.item(), rel=1e-6)


def test_without_distillation_the_teacher_sees_the_key_view_alone():
    objective = student(weights={"alpha": 0.0})
    seen = images_seen_by(objective.teacher)
    parts = objective(views(), TARGET, IDS)
    assert "distillation" not in parts
    assert len(seen) == 1 and torch.equal(seen[0], views()[2])
    distilled = student()
    seen = images_seen_by(distilled.teacher)
    distilled(views(), TARGET, IDS)
    assert sum(len(images) for images in seen) == 2 * BATCH


def test_the_student_sees_classifier_and_query_view_in_one_forward():
    objective = student()
    seen = images_seen_by(objective.model)
    objective(views(), TARGET, IDS)
    assert len(seen) == 1 and torch.equal(seen[0], torch.cat([views()[0], views()[1]]))


def test_heads_start_equal_but_apart():
    objective = student()
    pairs = list(zip(objective.query_head.parameters(), objective.key_head.parameters(), strict=True))
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)


@pytest.mark.parametrize(
    ("of_teacher", "of_student"), [("torchvision/resnet18", "resnet20"), ("resnet20", "torchvision/resnet18")]
)
def test_a_teacher_of_another_width_has_its_own_key_head(of_teacher, of_student):
    objective = student(teacher=network(of_teacher, seed=1), model=network(of_student))
    width = objective.teacher.feature_dim
    assert {width, objective.model.feature_dim} == {64, 512}
    assert objective.queues.features.shape == (16, width)
    parts = objective(views(), TARGET, IDS)
    parts["loss"].backward()
    for part in (objective.model.backbone, objective.model.classifier, objective.query_head, objective.key_head):
        assert gradient(part) > 0
    assert parts["distillation"] > 0 and all(torch.isfinite(part) for part in parts.values())
    expected = copy.deepcopy(objective.teacher)(views()[2])[0]
    stored = {int(i): objective.queues.features[row] for row, i in enumerate(objective.queues.sample_ids) if i >= 0}
    assert all(torch.allclose(stored[int(i)], expected[k], rtol=1e-4, atol=1e-5) for k, i in enumerate(IDS))


def test_a_queue_with_only_the_querys_own_image_is_counted_and_finite():
    objective = student()
    length = int(objective.queues.lengths[2])
    assert length == 2
    # Both slots of the rarest class hold image 103: its key from this step, and an older one from an earlier epoch.
    objective(views(), TARGET, IDS)
    parts = objective(views(), TARGET, IDS)
    assert objective.queues.sample_ids[-length:].tolist() == [103, 103]
    assert parts["queries_without_keys"].item() == 1
    parts["loss"].backward()
    assert torch.isfinite(parts["loss"]) and torch.isfinite(parts["tau"]) and torch.isfinite(objective.log_tau_g.grad)
    assert all(torch.isfinite(p.grad).all() for p in objective.parameters() if p.grad is not None)


def test_queries_with_another_key_of_their_class_are_not_counted():
    parts = student()(views(), TARGET, IDS)
    assert parts["queries_without_keys"].item() == 0


@pytest.mark.parametrize("train_tau_g", [True, False])
def test_weight_decay_spares_the_temperature_alone(train_tau_g):
    objective = student(train_tau_g=train_tau_g)
    assert [p is objective.log_tau_g for p in objective.undecayed()] == [True]


def test_a_memory_too_small_for_its_classes_is_rejected():
    with pytest.raises(ValueError, match="raise the total to at least 18"):
        student(minimum=6)

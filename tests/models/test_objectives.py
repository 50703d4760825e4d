"""What a step of teacher and student training computes, what it moves, and what it leaves alone."""

import copy

import pytest
import torch

import models.objectives
from models.cosine_classifier import ImageClassifier
from models.losses import adjusted_cross_entropy, distillation_loss, gml_loss, other_sample_mask
from models.objectives import StudentObjective, StudentWeights, TeacherObjective

CLASSES, COUNTS, BATCH = 3, [50, 12, 3], 6
LOG_PRIOR = torch.tensor([50 / 65, 12 / 65, 3 / 65]).log()
TARGET = torch.tensor([0, 0, 1, 2, 0, 1])
IDS = torch.arange(100, 106)


def network(backbone="resnet20", seed=0):
    torch.manual_seed(seed)
    return ImageClassifier(backbone, CLASSES, 0.1)


def student(*, model=None, teacher=None, weights=None, train_tau_g=True, total=16, minimum=2, counts=COUNTS, **encoder):
    teacher = teacher or network(seed=1)
    model = model or network()
    chosen = {
        "gamma": 0.7, "beta": 1.5, "alpha": 2.0, "distillation_temperature": 4.0, "prior_strength": 0.5, **(weights or {}),
    }  # fmt: skip
    torch.manual_seed(2)
    return StudentObjective(
        model, teacher, LOG_PRIOR, counts, StudentWeights(**chosen),
        tau_g=0.2, train_tau_g=train_tau_g, queue_total=total, queue_minimum=minimum, projection_dim=8,
        generator=torch.Generator().manual_seed(3), **encoder,
    ).train()  # fmt: skip


def views(number=3, batch=BATCH):
    return torch.randn(number, batch, 3, 8, 8, generator=torch.Generator().manual_seed(4))


def images_seen_by(module):
    seen = []
    module.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    return seen


def descend(objective, rate=0.1):
    """One plain gradient step, and what the engine calls after it."""
    objective.zero_grad()
    objective(views(objective.views), TARGET, IDS)["loss"].backward()
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter -= rate * parameter.grad
    objective.after_step()


def gradient(module):
    return sum(p.grad.abs().sum().item() for p in module.parameters() if p.grad is not None)


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
def test_a_teacher_of_another_width_gets_a_key_head_of_its_own_and_teaches_as_any_other(of_teacher, of_student):
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


def test_a_short_queue_full_of_a_querys_own_image_is_counted_and_stays_finite():
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


def test_a_memory_too_small_for_its_classes_is_refused():
    with pytest.raises(ValueError, match="raise the total to at least 18"):
        student(minimum=6)


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
    monkeypatch.setattr(models.objectives, "adjusted_cross_entropy", None)
    objective = student(weights={"gamma": 0.0})
    parts = objective(views(), TARGET, IDS)
    parts["loss"].backward()
    assert "classification" not in parts and gradient(objective.model.classifier) > 0
    total = 1.5 * (parts["gml"] + parts["tau"]) + 2.0 * parts["distillation"]
    assert parts["loss"].item() == pytest.approx(total.item(), rel=1e-6)


@pytest.mark.parametrize("term", ["gamma", "beta", "alpha"])
def test_a_term_switched_off_leaves_the_others_as_they_were(term):
    whole, without = student(), student(weights={term: 0.0})
    parts, left = whole(views(), TARGET, IDS), without(views(), TARGET, IDS)
    gone = {
        "gamma": {"classification"},
        "beta": {"gml", "tau", "tau_g", "queries_without_keys"},
        "alpha": {"distillation"},
    }
    assert set(parts) - set(left) == gone[term]
    for name in set(left) - {"loss"}:
        # Without the query view beside it, the classifier view has batch-norm statistics of its own.
        assert term == "beta" or torch.equal(left[name], parts[name]), name


def test_a_classifier_that_no_term_trains_is_refused():
    with pytest.raises(ValueError, match="gamma and alpha are both 0, so no term trains the classifier"):
        student(weights={"gamma": 0.0, "alpha": 0.0})


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
def test_a_teacher_is_kept_where_a_term_needs_it_and_missed_where_it_is_not_given(weights, encoder, needed):
    objective = student(weights=weights, contrast_encoder=encoder)
    assert (objective.teacher is not None) == needed
    assert any(name.startswith("teacher.") for name in objective.state_dict()) == needed
    chosen = {"gamma": 0.7, "beta": 1.5, "alpha": 2.0, **weights}
    chosen = StudentWeights(**chosen, distillation_temperature=4.0, prior_strength=1.0)
    assert chosen.need_teacher(encoder) == needed
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


def test_momentum_features_are_filed_under_their_own_label_and_image():
    # The official code shuffles the images and not their labels and ids, so that the pairs it stores do not match.
    objective = without_teacher()
    reference = copy.deepcopy(objective.momentum_encoder)
    objective(views(), TARGET, IDS)
    expected = reference(views()[2])
    rows = {int(i): row for row, i in enumerate(objective.queues.sample_ids) if i >= 0}
    assert set(rows) == set(IDS.tolist())
    for place, (sample, label) in enumerate(zip(IDS.tolist(), TARGET.tolist(), strict=True)):
        assert torch.allclose(objective.queues.features[rows[sample]], expected[place], rtol=1e-4, atol=1e-6)
        assert objective.queues.row_class[rows[sample]] == label


def test_gml_without_teacher_equals_its_definition_and_trains_the_query_side_alone():
    objective = without_teacher()
    descend(objective)  # apart from the student, as it is from the second step on
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

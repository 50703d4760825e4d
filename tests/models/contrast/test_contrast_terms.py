"""Contrast terms: golden values in float64, slow references with loops, properties, gradients.

The golden values of BCL (mean), PaCo, GPaCo and kappa of ProCo agree with the official code; those of SupCon, KCL, CRD and
the logits of ProCo (scipy) do not come from it.
"""

import math

import pytest
import torch
from torch.nn.functional import normalize

from models.contrast.crd import CRD, noise_contrastive_losses
from models.contrast.kcl import KPositiveContrast, k_positive_losses
from models.contrast.memories import FifoQueue
from models.contrast.paco import GPaCo, PaCo, parametric_losses
from models.contrast.proco import ProCo, class_logits, concentration
from models.contrast.supcon import BalancedContrast, SupCon, balanced_losses, supervised_losses
from tests.support.contrast_cases import (
    CENTRES,
    EXACT,
    LOG_PRIOR,
    LOGITS,
    PRIOR,
    QUEUE,
    QUEUE_CLASS,
    TARGET,
    TAU,
    VIEWS,
    U,
    V,
    filled,
    inputs,
    unchanged,
    unit,
)

ROWS, LABELS = VIEWS.flatten(0, 1), TARGET.repeat(2)
OWN = torch.arange(4)


def angles(*degrees):
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in degrees], dtype=torch.float64)


THREE = torch.stack([angles(0, 90, 20), angles(30, 60, -40)])


def test_supcon_rows_equal_the_golden_values():
    rows = supervised_losses(ROWS @ ROWS.T / TAU, LABELS[:, None] == LABELS, OWN)
    assert rows.tolist() == pytest.approx([0.162233794965, 1.671495281070, 0.217253214873, 1.271669094710], **EXACT)


def test_supcon_rows_of_three_images_equal_the_golden_values_with_the_factor_of_the_official_code():
    rows, labels = THREE.flatten(0, 1), torch.tensor([0, 1, 0]).repeat(2)
    losses = supervised_losses(rows @ rows.T / 0.1, labels[:, None] == labels, torch.arange(6)) * 0.1 / 0.07
    golden = [
        1.907935822158566,
        0.043889657739093,
        3.329844447260175,
        4.315022510499032,
        1.246918274002254,
        3.40180081049488,
    ]
    assert losses.tolist() == pytest.approx(golden, **EXACT)


@pytest.mark.parametrize(
    ("tau", "base", "labels", "expected"),
    [
        (0.1, 0.07, [0, 1, 0], 2.3742352536923335),
        (0.1, None, [0, 1, 0], 1.6619646775846333),
        (0.5, 0.07, [0, 1, 0], 9.195324493641186),
        (0.5, None, [0, 1, 0], 1.287345429109766),
        (0.1, 0.07, [0, 1, 2], 2.851241845238184),
    ],
)
def test_the_supcon_term_equals_the_golden_means(tau, base, labels, expected):
    term = SupCon(unchanged(), tau, base)
    batch = inputs(THREE, torch.tensor(labels), torch.arange(3))
    assert term(batch)["loss"].item() == pytest.approx(expected, **EXACT)


def test_the_gradient_of_supcon_equals_the_golden_value():
    views = THREE.clone().requires_grad_()
    SupCon(unchanged(), 0.1, 0.07)(inputs(views, torch.tensor([0, 1, 0]), torch.arange(3)))["loss"].backward()
    assert views.grad[0, 0].tolist() == pytest.approx([0.9466209835756648, -0.5020130221868613], **EXACT)


def test_an_anchor_without_a_positive_has_the_loss_0_and_finite_gradients():
    rows = THREE[0].clone().requires_grad_()
    losses = supervised_losses(rows @ rows.T / 0.1, torch.eye(3, dtype=torch.bool), torch.arange(3))
    losses.sum().backward()
    assert losses.tolist() == [0, 0, 0] and rows.grad.isfinite().all()


@pytest.mark.parametrize(("tau", "mean"), [(0.1, 4.503242072907687), (0.5, 1.446816595494783)])
def test_supcon_against_separate_keys_is_the_mean_over_positives_of_equation_9(tau, mean):
    queries, keys = (
        U,
        torch.tensor([[1, 0], [0.6, 0.8], [0, 1], [-0.6, 0.8], [-0.8, 0.6], [0, -1]], dtype=torch.float64),
    )
    same = TARGET[:, None] == torch.tensor([0, 0, 1, 1, 2, 2])
    assert supervised_losses(queries @ keys.T / tau, same).mean().item() == pytest.approx(mean, **EXACT)


def bcl(views=VIEWS, target=TARGET, centres=CENTRES):
    term = BalancedContrast(unchanged(), unchanged(), TAU)
    return term(inputs(views, target, torch.arange(len(target)), class_weight=centres))["loss"]


def slow_bcl(rows, labels, centres):
    """BCL with loops: the loss of each row."""
    candidates = [*zip(rows, labels.tolist(), strict=True), *zip(centres, range(len(centres)), strict=True)]
    losses = []
    for i, (anchor, y) in enumerate(candidates[: len(rows)]):
        total, positives = 0.0, []
        for c in range(len(centres)):
            scores = [float(anchor @ f) / TAU for j, (f, label) in enumerate(candidates) if label == c and j != i]
            total += sum(map(math.exp, scores)) / len(scores)
            positives += scores if c == y else []
        losses.append(math.log(total) - sum(positives) / len(positives))
    return losses


def test_bcl_equals_the_golden_values():
    rows = [0.496204181376, 0.982793756674, 0.329459315187, 2.117706151426]
    candidates, classes = torch.cat([ROWS, CENTRES]), torch.cat([LABELS, torch.arange(3)])
    losses = balanced_losses(ROWS @ candidates.T / TAU, LABELS, classes, OWN, torch.bincount(classes))
    assert losses.tolist() == pytest.approx(rows, **EXACT) == slow_bcl(ROWS, LABELS, CENTRES)
    assert bcl().item() == pytest.approx(0.981540851166, **EXACT)


def test_bcl_equals_its_slow_reference_on_random_features_with_an_absent_class():
    views, target = unit(2, 5, 6), torch.tensor([0, 0, 1, 3, 0])
    expected = slow_bcl(views.flatten(0, 1), target.repeat(2), unit(4, 6, seed=1))
    assert bcl(views, target, unit(4, 6, seed=1)).item() == pytest.approx(sum(expected) / 10, abs=1e-12)


def test_bcl_with_equal_counts_is_supcon_with_centres_but_for_the_weight_of_the_own_class():
    views, centres = unit(2, 3, 6), unit(3, 6, seed=1)
    rows, labels = torch.cat([*views, centres]), torch.cat([torch.arange(3).repeat(2), torch.arange(3)])
    exponent, same = rows[:6] @ rows.T / TAU, labels[:6, None] == labels
    # Each class has 3 rows: weight 1/3, and 1/2 for the own class.
    shifted = supervised_losses(exponent, same, torch.arange(6), math.log(3 / 2) * same.double())
    assert bcl(views, torch.arange(3), centres).item() == pytest.approx(shifted.mean().item() - math.log(3), abs=1e-12)


def slow_paco(anchors, own, logits, target, candidates, classes, alpha):
    losses = []
    for i, anchor in enumerate(anchors):
        y = int(target[i])
        scores = [(float(z), 1.0 if c == y else 0.0) for c, z in enumerate(logits[i])]
        for j, feature in enumerate(candidates):
            if j != own[i]:
                scores.append((float(anchor @ feature) / TAU, alpha if int(classes[j]) == y else 0.0))
        log_total = math.log(sum(math.exp(score) for score, _ in scores))
        losses.append(sum(m * (log_total - s) for s, m in scores) / sum(m for _, m in scores))
    return losses


@pytest.mark.parametrize(("anchors", "golden"), [(2, 2.070545037416), (4, 2.157288498318)])
def test_paco_and_gpaco_equal_the_golden_values_and_the_slow_reference(anchors, golden):
    log_prior = (PRIOR + 1e-9).log()  # as in the official code
    queue = filled(FifoQueue(2, 2))
    if anchors == 2:
        loss = PaCo(unchanged(), log_prior, queue, TAU)(inputs(VIEWS[:1], key=V, logits=LOGITS[None]))["loss"]
    else:
        loss = GPaCo(unchanged(), log_prior, queue, TAU)(inputs(logits=LOGITS.repeat(2, 1, 1)))["loss"]
    candidates, classes = torch.cat([ROWS, QUEUE]), torch.cat([LABELS, QUEUE_CLASS])
    logits = LOGITS.repeat(2, 1) + log_prior
    expected = slow_paco(ROWS[:anchors], range(anchors), logits, LABELS, candidates, classes, 0.05)
    assert loss.item() == pytest.approx(sum(expected) / anchors, abs=1e-12)
    assert loss.item() == pytest.approx(golden, **EXACT)


def test_kcl_rows_equal_the_golden_values():
    for row, golden in enumerate([0.954304456836, 0.751250513728]):
        one = slice(row, row + 1)
        term = KPositiveContrast(unchanged(), filled(FifoQueue(2, 2)), TAU)
        loss = term(inputs(VIEWS[:1, one], TARGET[one], torch.tensor([row]), key=V[one]))["loss"]
        assert loss.item() == pytest.approx(golden, **EXACT)


def test_kcl_uses_at_most_k_positives_and_keeps_the_other_keys_of_the_class_as_negatives():
    query, key, queue = unit(4, 5), unit(4, 5, seed=1), unit(12, 5, seed=2)
    target, labels = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1, 0, 2, 0, -1, 1, 0, 1, 0, 1])
    order = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    losses = k_positive_losses((query * key).sum(1) / TAU, query @ queue.T / TAU, target[:, None] == labels, order, 2)
    for i in range(4):
        own = float(query[i] @ key[i]) / TAU
        scores = [float(query[i] @ feature) / TAU for feature in queue]
        chosen = sorted((j for j in range(12) if labels[j] == i), key=lambda j: -order[j])[:2]
        positives = [own, *(scores[j] for j in chosen)]
        expected = math.log(sum(map(math.exp, [own, *scores]))) - sum(positives) / len(positives)
        assert losses[i].item() == pytest.approx(expected, abs=1e-12)


MEANS = torch.tensor([[0.6, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0, -0.4]], dtype=torch.float64)
SPHERE = torch.tensor([[0.8, 0.6, 0, 0], [0, 0, 0, -1]], dtype=torch.float64)


def test_proco_equals_the_golden_values():
    assert concentration(MEANS)[0].tolist() == pytest.approx([3.75, 2.666666666667, 1.904761904762], **EXACT)
    logits = class_logits(SPHERE, MEANS, TAU)
    golden = [[1.205720627401, 0.921640984111, 0.413460299094], [0.328875897160, 0.378064457861, 1.099125587875]]
    for row, expected in zip(logits.tolist(), golden, strict=True):
        assert row == pytest.approx(expected, rel=0, abs=1e-9)
    loss = torch.nn.functional.cross_entropy(logits + LOG_PRIOR, TARGET)
    assert loss.item() == pytest.approx(0.775172760342, rel=0, abs=1e-9)


@pytest.mark.parametrize("dim", [3, 4, 32, 128, 1024])
def test_the_logits_of_proco_equal_those_of_scipy(dim):
    special = pytest.importorskip("scipy.special")
    query, means, order = (
        unit(3, dim),
        unit(5, dim, seed=1) * torch.tensor([0.05, 0.3, 0.7, 0.9, 0.99])[:, None],
        dim / 2 - 1,
    )

    def log_ratio(t):
        return math.log(special.ive(order, t)) + t - order * math.log(t)

    logits = class_logits(query, means, 0.1)
    for i in range(3):
        for c in range(5):
            length = float(means[c].norm())
            kappa = dim * length / (1 - length**2)
            if special.ive(order, kappa) < 1e-280:
                continue  # scipy underflows
            moved = float((kappa * means[c] / length + query[i] / 0.1).norm())
            assert logits[i, c].item() == pytest.approx(log_ratio(moved) - log_ratio(kappa), rel=0, abs=2e-9)


def test_a_class_without_features_and_a_class_of_one_feature_have_finite_proco_losses_and_gradients():
    term = ProCo(unchanged(), LOG_PRIOR.float(), 8, 0.1)
    views = unit(2, 2, 8).float()[:, [0, 0]].requires_grad_()
    loss = term(inputs(views, torch.tensor([0, 0])))["loss"]
    loss.backward()
    assert loss.isfinite() and views.grad.isfinite().all()


def crd(temperature, log_z=None):
    """The golden case of CRD: 5 images, 3 negatives, 2 dimensions."""
    term = CRD(2, 2, torch.tensor([0, 1, 0, 1, 1]), dim=2, negatives=3, temperature=temperature).double()
    term.student_head, term.teacher_head = unchanged(), unchanged()
    student = torch.tensor([[1, 0], [0, 1], [-1, 0], [1, 1], [1, -1]], dtype=torch.float64)
    teacher = torch.tensor([[1, 0.2], [0.1, 1], [-1, 0.3], [0.8, 1], [1, -0.7]], dtype=torch.float64)
    term.memory = normalize(torch.stack([student, teacher]), dim=2)
    if log_z is not None:
        term.log_z = torch.tensor(log_z, dtype=torch.float64).log()
    v1 = normalize(torch.tensor([[0.9, 0.1], [-0.2, 1]], dtype=torch.float64), dim=1).requires_grad_()
    v2 = normalize(torch.tensor([[1, 0.3], [0.2, 0.9]], dtype=torch.float64), dim=1).requires_grad_()
    return term, v1, v2, torch.tensor([[0, 1, 2, 3], [1, 0, 4, 2]])


@pytest.mark.parametrize(
    ("tau", "z", "total"),
    [
        (0.5, (14.804236979829646, 15.0696541095908), 2.601015816158167),
        (0.07, (1498649.1806753725, 1440738.593105227), 0.6056540172952272 + 0.7703816064287625),
    ],
)
def test_crd_equals_the_golden_values_and_keeps_the_z_of_the_first_batch(tau, z, total):
    term, v1, v2, rows = crd(tau)
    assert term.losses(v1, v2, rows).mean().item() == pytest.approx(total, **EXACT)
    assert term.log_z.exp().tolist() == pytest.approx(z, rel=1e-12)
    term.losses(v2, v1, rows)
    assert term.log_z.exp().tolist() == pytest.approx(z, rel=1e-12)


@pytest.mark.parametrize(
    ("tau", "student", "teacher"),
    [(0.5, 1.2868476291036197, 1.3141681870545474), (0.07, 0.6056540172952272, 0.7703816064287625)],
)
def test_each_direction_of_crd_has_its_golden_loss(tau, student, teacher):
    term, v1, v2, rows = crd(tau)
    # Anchors of zeros have the score exp(0) with each of the 5 rows, so that Z is 5, each x is 1/5 and c is 3/5.
    zeros, loss_of_zeros = torch.zeros_like(v1), 4 * math.log(0.8 + 1e-7) - math.log(0.2) - 3 * math.log(0.6)
    assert term.losses(v1, zeros, rows).mean().item() - loss_of_zeros == pytest.approx(student, **EXACT)
    term, v1, v2, rows = crd(tau)
    assert term.losses(zeros, v2, rows).mean().item() - loss_of_zeros == pytest.approx(teacher, **EXACT)


@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
def test_the_losses_of_crd_and_their_gradients_equal_a_sum_by_logaddexp_also_where_both_terms_are_equal(scale):
    exponent = scale * torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_z, limit = torch.tensor(2.0, dtype=torch.float64), math.log(29 / 50 + 1e-7)
    exponent[0] = log_z + limit
    given = [exponent.clone().requires_grad_() for _ in range(2)]
    other = given[1] - log_z
    sums = torch.logaddexp(other, torch.full_like(other, limit)).sum(1)
    expected = sums - other[:, 0] - 29 * math.log(29 / 50)
    losses = noise_contrastive_losses(given[0], log_z, 50)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad(each.sum(), x)[0] for each, x in zip((losses, expected), given, strict=True)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tau", [0.07, 0.005])
def test_crd_is_finite_in_float32_at_any_temperature(tau):
    term, v1, v2, rows = crd(tau)
    expected = term.losses(v1, v2, rows)
    single, w1, w2, _ = crd(tau)
    w1, w2 = (v.detach().float().requires_grad_() for v in (w1, w2))
    single.float()
    single.log_z.fill_(torch.inf)
    losses = single.losses(w1, w2, rows)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    assert w1.grad.isfinite().all() and w2.grad.isfinite().all()


def test_crd_with_a_stored_z_and_its_gradients_equal_the_golden_values():
    term, v1, v2, rows = crd(0.5, [4.0, 3.0])
    assert term.losses(v1, v2, rows).mean().item() == pytest.approx(3.538835728278343, **EXACT)
    term, v1, v2, rows = crd(0.5)
    term.losses(v1, v2, rows).mean().backward()
    golden = [-0.34169080336121, 0.29002111950962, -0.15024638778800, -0.49541003400868]
    assert v1.grad.flatten().tolist() == pytest.approx(golden, **EXACT)
    golden = [-0.31024239276656, 0.44106800824527, 0.10466798517013, -0.58780042781368]
    assert v2.grad.flatten().tolist() == pytest.approx(golden, **EXACT)


def test_crd_stores_the_batch_after_the_step():
    term, v1, v2, _ = crd(0.5)
    before = term.memory.clone()
    term(inputs(v1[None], torch.tensor([0, 1]), key=v2))["loss"].backward()
    assert torch.equal(term.memory, before)
    term.after_step()
    golden = [0.998469762855546, 0.055300385741788, -0.098537617966642, 0.995133326668070]
    assert term.memory[0, :2].flatten().tolist() == pytest.approx(golden, **EXACT)
    golden = [0.970276349603369, 0.241999597934294, 0.158497567547730, 0.987359367748872]
    assert term.memory[1, :2].flatten().tolist() == pytest.approx(golden, **EXACT)
    assert torch.equal(term.memory[:, 2:], before[:, 2:])


def test_crd_draws_each_image_of_the_other_classes_equally_often():
    term = CRD(2, 2, torch.tensor([2, 0, 1, 0, 2, 2]), dim=2, negatives=20000)
    for row, allowed in zip(
        term.draw(torch.tensor([0, 2, 1])), ([0, 2, 4, 5], [1, 2, 3], [0, 1, 3, 4, 5]), strict=True
    ):
        images, counts = row.unique(return_counts=True)
        assert images.tolist() == allowed
        assert (counts / 20000).tolist() == pytest.approx([1 / len(allowed)] * len(allowed), abs=0.015)


def test_any_two_draws_of_crd_are_independent_and_two_anchors_of_a_class_differ_by_one_turn():
    term, others = CRD(2, 2, torch.tensor([0] * 3 + [1] * 2 + [2] * 3), dim=2, negatives=3), 5
    steps = []
    for _ in range(3000):
        steps.append(term.draw(torch.tensor([0, 0])) - 3)  # position among the images of other classes
        term.draws.add_(1)
    drawn = torch.stack(steps)
    turns = (drawn[:, 1] - drawn[:, 0]) % others
    assert ((turns - turns[:, :1] + 1) % others <= 2).all()  # of whole images, so that they differ by rounding
    for first, second in (((0, 0), (1, 0)), ((0, 0), (1, 1)), ((0, 1), (1, 0)), ((0, 0), (0, 1))):
        pairs = drawn[:, first[0], first[1]] * others + drawn[:, second[0], second[1]]
        expected = len(drawn) / others**2
        counts = torch.bincount(pairs, minlength=others**2)
        assert ((counts - expected) ** 2 / expected).sum() < 60  # chi-squared of 24 degrees of freedom: 6e-5


def test_gradients_of_every_loss_equal_finite_differences():
    free, queue, target = unit(4, 6).requires_grad_(), unit(5, 6, seed=1).requires_grad_(), torch.tensor([0, 1, 0, 2])
    same, own, key_class = target[:, None] == target, torch.arange(4), torch.tensor([0, 1, 2, -1, 0])
    classes = torch.cat([target, torch.arange(5) % 3])
    order, means = torch.rand(5, dtype=torch.float64), 0.5 * unit(3, 6, seed=2)
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def both(a, b):
        return a @ torch.cat([a, b]).T

    check = torch.autograd.gradcheck
    assert check(lambda a: supervised_losses(a @ a.T, same, own), free)
    assert check(lambda a, b: balanced_losses(both(a, b), target, classes, own, torch.bincount(classes)), (free, queue))
    assert check(lambda a, b, z: parametric_losses(z, both(a, b), target, classes, own, 0.05), (free, queue, logits))
    assert check(
        lambda a, b: k_positive_losses(a.sum(1), a @ b.T, target[:, None] == key_class, order, 1), (free, queue)
    )
    assert check(lambda a: class_logits(a, means, 0.1), free)


@pytest.mark.parametrize("name", ["supcon", "bcl", "gpaco", "proco"])
def test_the_order_of_the_batch_does_not_change_the_loss(name):
    order = torch.tensor([3, 0, 4, 1, 2])
    views, target, logits = unit(2, 5, 6), torch.tensor([0, 2, 0, 1, 2]), torch.randn(2, 5, 3, dtype=torch.float64)

    def loss(chosen):
        term = {
            "supcon": lambda: SupCon(unchanged(), TAU),
            "bcl": lambda: BalancedContrast(unchanged(), unchanged(), TAU),
            "gpaco": lambda: GPaCo(unchanged(), LOG_PRIOR, FifoQueue(5, 6, torch.Generator().manual_seed(0)), TAU),
            "proco": lambda: ProCo(unchanged(), LOG_PRIOR, 6, TAU).double(),
        }[name]()
        batch = inputs(
            views[:, chosen], target[chosen], chosen, logits=logits[:, chosen], class_weight=unit(3, 6, seed=1)
        )
        return term(batch)["loss"].item()

    assert loss(order) == pytest.approx(loss(torch.arange(5)), abs=1e-12)


def test_a_missing_input_and_a_wrong_number_of_views_are_refused():
    with pytest.raises(ValueError, match=r"logits is None, but GPaCo needs it; pass the class logits"):
        GPaCo(unchanged(), LOG_PRIOR, FifoQueue(2, 2), TAU)(inputs())
    with pytest.raises(ValueError, match=r"queries of SupCon .*expected \[2,B,D\]"):
        SupCon(unchanged(), TAU)(inputs(VIEWS[:1]))
    with pytest.raises(ValueError, match="labels contain one class only"):
        CRD(2, 2, torch.zeros(4, dtype=torch.int64))

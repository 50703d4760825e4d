"""The loss terms against brute force in plain Python floats, and properties for any finite input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.contrast.gml_reference import gml_loss, mixture_log_scores, other_sample_mask
from models.losses.adjusted_cross_entropy import adjusted_cross_entropy
from models.losses.distillation import distillation_loss


def log_mean_exp(values):
    """Reference log-mean-exp in plain Python: subtract the maximum, sum exactly."""
    peak = max(values)
    return peak + math.log(math.fsum(math.exp(value - peak) for value in values) / len(values))


def brute_scores(case, row):
    """Return log s_c of Eq. 4 for one query: a list over classes, None for a class without a key."""
    scores = []
    for c in range(case["classes"]):
        kept = [
            value / case["tau"]
            for value, owner, keep in zip(case["similarity"][row], case["row_class"], case["mask"][row], strict=True)
            if owner == c and keep
        ]
        scores.append(log_mean_exp(kept) if kept else None)
    return scores


def brute_loss(case):
    """Compute Eq. 10 query by query; a query without a key of its class is excluded from the mean."""
    losses = []
    for row, target in enumerate(case["target"]):
        scores = brute_scores(case, row)
        if scores[target] is None:
            continue
        logits = [
            score + case["strength"] * log_p
            for score, log_p in zip(scores, case["log_prior"], strict=True)
            if score is not None
        ]
        peak = max(logits)
        normaliser = peak + math.log(math.fsum(math.exp(logit - peak) for logit in logits))
        losses.append(normaliser - scores[target] - case["strength"] * case["log_prior"][target])
    return math.fsum(losses) / len(losses) if losses else 0.0


@st.composite
def cases(draw):
    classes = draw(st.integers(2, 5))
    # Every class has a key, and the rows are in random order: the loss must not depend on the queue's layout.
    extra = draw(st.lists(st.integers(0, classes - 1), max_size=8))
    row_class = draw(st.permutations([*range(classes), *extra]))
    batch = draw(st.integers(1, 4))
    cosine = st.floats(-1, 1, allow_subnormal=False)
    weights = draw(st.lists(st.integers(1, 5000), min_size=classes, max_size=classes))

    def rows(cell):
        return draw(
            st.lists(st.lists(cell, min_size=len(row_class), max_size=len(row_class)), min_size=batch, max_size=batch)
        )

    mask = rows(st.sampled_from([True, True, False]))
    if draw(st.booleans()):
        # Mask all keys of a class for a query.
        row, emptied = draw(st.integers(0, batch - 1)), draw(st.integers(0, classes - 1))
        mask[row] = [keep and owner != emptied for keep, owner in zip(mask[row], row_class, strict=True)]
    return {
        "classes": classes,
        "row_class": row_class,
        "similarity": rows(cosine),
        "mask": mask,
        "target": draw(st.lists(st.integers(0, classes - 1), min_size=batch, max_size=batch)),
        "log_prior": [math.log(weight / sum(weights)) for weight in weights],
        "tau": draw(st.floats(0.01, 1)),
        "strength": draw(st.sampled_from([0.0, 0.2, 1.0, 2.5])),
    }


def tensors(case, dtype=torch.float64, masked=True):
    return {
        "similarity": torch.tensor(case["similarity"], dtype=dtype),
        "row_class": torch.tensor(case["row_class"]),
        "target": torch.tensor(case["target"]),
        "log_prior": torch.tensor(case["log_prior"], dtype=dtype),
        "temperature": case["tau"],
        "strength": case["strength"],
        "mask": torch.tensor(case["mask"]) if masked else None,
    }


def whole(case):
    """The same case without a mask."""
    return {**case, "mask": [[True] * len(row) for row in case["mask"]]}


@given(cases())
def test_the_gml_loss_equals_equation_10_under_any_mask(case):
    assert gml_loss(**tensors(case)).item() == pytest.approx(brute_loss(case), rel=1e-12, abs=1e-10)


@given(cases())
def test_the_gml_loss_without_a_mask_equals_one_that_keeps_everything(case):
    unmasked = gml_loss(**tensors(case, masked=False)).item()
    assert unmasked == pytest.approx(brute_loss(whole(case)), rel=1e-12, abs=1e-10)
    assert unmasked == pytest.approx(gml_loss(**tensors(whole(case))).item(), rel=0, abs=1e-12)


@given(cases())
def test_the_class_scores_equal_a_log_mean_exp_and_an_emptied_class_scores_minus_infinity(case):
    given_tensors = tensors(case)
    scores, keys = mixture_log_scores(
        given_tensors["similarity"], given_tensors["row_class"], case["classes"], case["tau"], given_tensors["mask"]
    )
    for row in range(len(case["target"])):
        expected = [-math.inf if score is None else score for score in brute_scores(case, row)]
        assert scores[row].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-10)
        for c in range(case["classes"]):
            kept = [keep for keep, owner in zip(case["mask"][row], case["row_class"], strict=True) if owner == c]
            assert keys[row, c].item() == sum(kept)


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_the_keys_does_not_matter(case, random):
    order = list(range(len(case["row_class"])))
    random.shuffle(order)
    shuffled = {
        **case,
        "row_class": [case["row_class"][i] for i in order],
        "similarity": [[row[i] for i in order] for row in case["similarity"]],
        "mask": [[row[i] for i in order] for row in case["mask"]],
    }
    assert gml_loss(**tensors(shuffled)).item() == pytest.approx(gml_loss(**tensors(case)).item(), rel=1e-12, abs=1e-12)


@given(cases(), st.floats(0.1, 10))
def test_only_ratios_of_the_prior_matter_and_none_at_strength_0(case, scale):
    moved = {**case, "log_prior": [value + math.log(scale) for value in case["log_prior"]]}
    assert gml_loss(**tensors(moved)).item() == pytest.approx(gml_loss(**tensors(case)).item(), rel=1e-11, abs=1e-11)
    level = {**case, "strength": 0.0}
    uniform = {**case, "strength": 1.0, "log_prior": [-math.log(case["classes"])] * case["classes"]}
    assert gml_loss(**tensors(level)).item() == pytest.approx(gml_loss(**tensors(uniform)).item(), rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tau", [1e-3, 0.01, 0.1, 1.0])
def test_float32_stays_finite_down_to_a_temperature_of_a_thousandth(tau, masked):
    random = torch.Generator().manual_seed(1)
    similarity = (torch.rand(6, 40, generator=random) * 2 - 1).requires_grad_()
    # Extreme cosines: one class at +1, another at -1, for a query of either.
    row_class = torch.arange(40) % 4
    with torch.no_grad():
        similarity[0] = torch.where(row_class == 0, 1.0, -1.0)
        similarity[1] = torch.where(row_class == 0, 1.0, -1.0)
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    mask = torch.rand(6, 40, generator=random) > 0.4
    mask[2] &= row_class != 2
    mask[3] = False
    log_tau = torch.tensor(tau).log().requires_grad_()
    log_prior = torch.tensor([0.97, 0.01, 0.01, 0.01]).log()
    loss = gml_loss(similarity, row_class, target, log_prior, log_tau.exp(), mask=mask if masked else None)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss) and torch.isfinite(similarity.grad).all() and torch.isfinite(log_tau.grad)
    assert similarity.grad[1].abs().sum() > 0, "a query far from its class must still be pulled towards it"
    if masked:
        assert not similarity.grad[~mask].any(), "a pair that the mask takes out has no gradient"
        assert not similarity.grad[2].any() and not similarity.grad[3].any(), "nor has a query that is left out"


def test_a_batch_in_which_no_query_has_a_key_costs_nothing_and_has_no_gradient():
    similarity = torch.rand(2, 4, dtype=torch.float64).requires_grad_()
    log_tau = torch.tensor(0.1, dtype=torch.float64).log().requires_grad_()
    row_class, target = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0])
    mask = row_class.expand(2, 4) == 1
    loss = gml_loss(similarity, row_class, target, torch.tensor([0.5, 0.5]).double().log(), log_tau.exp(), mask=mask)
    loss.backward()
    assert loss.item() == 0 and not similarity.grad.any() and log_tau.grad == 0


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_the_gml_loss_agree_with_finite_differences(masked):
    random = torch.Generator().manual_seed(2)
    similarity = (torch.rand(4, 9, generator=random, dtype=torch.float64) * 2 - 1).requires_grad_()
    log_tau = torch.tensor(0.3, dtype=torch.float64).log().requires_grad_()
    row_class = torch.tensor([2, 0, 1, 0, 2, 1, 0, 0, 2])
    target = torch.tensor([0, 1, 2, 1])
    log_prior = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64).log()
    mask = None
    if masked:
        mask = torch.rand(4, 9, generator=random) > 0.3
        mask[0] &= row_class != 2  # masks another class
        mask[3] &= row_class != 1  # masks the query's class

    def loss(similarity, log_tau):
        return gml_loss(similarity, row_class, target, log_prior, log_tau.exp(), 0.7, mask)

    assert torch.autograd.gradcheck(loss, (similarity, log_tau), atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_loss_keeps_the_dtype_of_its_input(dtype):
    logits = torch.randn(3, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))
    target, log_prior = torch.tensor([0, 1, 3]), torch.full((4,), 0.25, dtype=dtype).log()
    row_class = torch.tensor([0, 1, 2, 3])
    mask = torch.eye(4, dtype=torch.bool)[:3]
    assert adjusted_cross_entropy(logits, target, log_prior, 0.5).dtype == dtype
    assert distillation_loss(logits, logits, 4.0).dtype == dtype
    assert gml_loss(logits, row_class, target, log_prior, 0.1, mask=mask).dtype == dtype
    assert mixture_log_scores(logits, row_class, 4, 0.1)[0].dtype == dtype


@given(st.lists(st.lists(st.floats(-30, 30), min_size=3, max_size=3), min_size=1, max_size=5), st.floats(0, 2))
def test_the_adjusted_cross_entropy_is_a_softmax_over_logits_times_the_prior(rows, strength):
    prior = [0.7, 0.2, 0.1]
    target = [i % 3 for i in range(len(rows))]
    expected = []
    for row, label in zip(rows, target, strict=True):
        mass = [p**strength * math.exp(value) for p, value in zip(prior, row, strict=True)]
        expected.append(-math.log(mass[label] / math.fsum(mass)))
    actual = adjusted_cross_entropy(
        torch.tensor(rows, dtype=torch.float64),
        torch.tensor(target),
        torch.tensor(prior, dtype=torch.float64).log(),
        strength,
    )
    assert actual.item() == pytest.approx(math.fsum(expected) / len(rows), rel=1e-12, abs=1e-10)


@given(
    st.lists(st.lists(st.floats(-20, 20), min_size=6, max_size=6), min_size=1, max_size=4), st.sampled_from([1.0, 4.0])
)
def test_distillation_is_the_kl_divergence_from_the_teacher_times_the_squared_temperature(rows, temperature):
    def softmax(values):
        mass = [math.exp(value / temperature) for value in values]
        return [value / math.fsum(mass) for value in mass]

    divergences = []
    for row in rows:
        teacher, student = softmax(row[3:]), softmax(row[:3])
        divergences.append(math.fsum(t * math.log(t / s) for t, s in zip(teacher, student, strict=True)))
    logits = torch.tensor(rows, dtype=torch.float64)
    actual = distillation_loss(logits[:, :3], logits[:, 3:], temperature)
    assert actual.item() == pytest.approx(temperature**2 * math.fsum(divergences) / len(rows), rel=1e-9, abs=1e-10)


def test_distillation_sends_no_gradient_to_the_teacher():
    student, teacher = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    distillation_loss(student, teacher, 4.0).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None


def test_a_query_meets_every_key_but_those_of_its_own_sample():
    mask = other_sample_mask(torch.tensor([7, 3]), torch.tensor([7, 1, 7, 3, -1]))
    assert mask.tolist() == [[False, True, False, True, True], [True, True, True, False, True]]

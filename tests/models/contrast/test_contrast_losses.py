"""L_GML and L_tau together: against brute force, against the reference gml_loss, and their memory."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.contrast.gml import ClassSegments, contrast_losses
from models.contrast.gml_reference import gml_loss, other_sample_mask

STRENGTH = 0.7


def key_runs(lengths):
    lengths = torch.tensor(lengths)
    row_class = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return ClassSegments(row_class, lengths.cumsum(0) - lengths, lengths, int(lengths.max()))


def both(case, similarity, temperature, **options):
    ids = {"query_ids": case["query_ids"], "key_ids": case["key_ids"]}
    log_prior = case["log_prior"].to(similarity.dtype)
    return contrast_losses(similarity, case["runs"], case["target"], log_prior, temperature, STRENGTH, **ids, **options)


def brute_force(case, tau):
    """Compute Eq. 10 over all keys and over other samples' keys, in plain floats; count queries that L_tau omits."""

    def loss(row, kept):
        masses = {}
        for c in set(case["runs"].row_class.tolist()):
            values = [
                math.exp((case["similarity"][row][k].item() - 1) / tau)
                for k, owner in enumerate(case["runs"].row_class.tolist())
                if owner == c and kept[k]
            ]
            if values:
                masses[c] = math.fsum(values) / len(values) * math.exp(STRENGTH * case["log_prior"][c].item())
        own = masses.get(case["target"][row].item())
        return None if own is None else math.log(math.fsum(masses.values()) / own)

    rows, keys = case["similarity"].shape
    others = other_sample_mask(case["query_ids"], case["key_ids"]).tolist()
    gml = [loss(row, [True] * keys) for row in range(rows)]
    tau_losses = [loss(row, others[row]) for row in range(rows)]
    kept = [value for value in tau_losses if value is not None]
    return math.fsum(gml) / rows, math.fsum(kept) / len(kept) if kept else 0.0, rows - len(kept)


@st.composite
def cases(draw):
    runs = key_runs(draw(st.lists(st.integers(1, 6), min_size=1, max_size=6)))
    keys, batch = len(runs.row_class), draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**16))
    random = torch.Generator().manual_seed(seed)
    target = torch.randint(len(runs.lengths), (batch,), generator=random)
    # Few sample ids per class, so that a query's image occurs once, often or not at all among the keys.
    key_ids = 100 * runs.row_class + torch.randint(3, (keys,), generator=random)
    query_ids = 100 * target + torch.randint(3, (batch,), generator=random)
    weights = torch.randint(1, 5000, (len(runs.lengths),), generator=random).double()
    return {
        "runs": runs,
        "similarity": torch.rand(batch, keys, generator=random, dtype=torch.float64) * 2 - 1,
        "target": target,
        "key_ids": key_ids,
        "query_ids": query_ids,
        "log_prior": (weights / weights.sum()).log(),
        "tau": draw(st.floats(0.02, 1)),
    }


@given(cases())
def test_both_losses_equal_equation_10_by_brute_force(case):
    gml, tau, left_out = brute_force(case, case["tau"])
    actual = both(case, case["similarity"], case["tau"])
    assert actual.gml.item() == pytest.approx(gml, rel=1e-12, abs=1e-10)
    assert actual.tau.item() == pytest.approx(tau, rel=1e-12, abs=1e-10)
    assert actual.queries_without_keys.item() == left_out


@given(cases(), st.sampled_from([1e-3, 0.01, 0.1, 1.0]))
def test_values_and_gradients_equal_the_reference_at_any_temperature(case, tau):
    results = []
    for fast in (True, False):
        similarity = case["similarity"].clone().requires_grad_()
        log_tau = torch.tensor(tau, dtype=torch.float64).log().requires_grad_()
        if fast:
            gml, of_tau, _ = both(case, similarity, log_tau.exp())
        else:
            mask = other_sample_mask(case["query_ids"], case["key_ids"])
            rest = (case["runs"].row_class, case["target"], case["log_prior"])
            gml = gml_loss(similarity, *rest, log_tau.exp().detach(), STRENGTH)
            of_tau = gml_loss(similarity.detach(), *rest, log_tau.exp(), STRENGTH, mask)
        # Unequal weights reveal a gradient assigned to the wrong loss.
        (2 * gml + 3 * of_tau).backward()
        results.append([gml.detach(), of_tau.detach(), similarity.grad, log_tau.grad])
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-10)


def example(dtype=torch.float64):
    random = torch.Generator().manual_seed(5)
    runs = key_runs([4, 2, 3, 1])
    return {
        "runs": runs,
        "similarity": (torch.rand(5, 10, generator=random, dtype=torch.float64) * 2 - 1).to(dtype),
        "target": torch.tensor([0, 1, 2, 3, 1]),
        "query_ids": torch.tensor([1, 2, 3, 4, 6]),
        # Class keys of query 4: only its own image; of query 6: its own image twice.
        "key_ids": torch.tensor([1, -1, -2, 1, 6, 6, -3, 3, -4, 4]),
        "log_prior": torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=dtype).log(),
    }


def test_gradients_agree_with_finite_differences():
    case = example()
    tau = torch.tensor(0.3, dtype=torch.float64)
    similarity = case["similarity"].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: both(case, s, tau).gml, (similarity,), atol=1e-8)
    log_tau = tau.log().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: both(case, case["similarity"], p.exp()).tau, (log_tau,), atol=1e-8)


def test_each_loss_has_a_gradient_for_one_input_only():
    case = example()
    for loss in ("gml", "tau"):
        similarity, tau = case["similarity"].clone().requires_grad_(), torch.tensor(0.3).double().requires_grad_()
        getattr(both(case, similarity, tau), loss).backward()
        reached = {"gml": similarity.grad, "tau": tau.grad}
        for name, gradient in reached.items():
            assert (gradient is not None and bool(gradient.any())) == (name == loss)


def test_l_tau_excludes_and_counts_a_query_with_only_its_own_image():
    case = example()
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    losses = both(case, case["similarity"], tau)
    losses.tau.backward()
    # The only key of class 3 is query 4's image; both keys of class 1 are query 6's; query 2 is of class 1 too.
    assert losses.queries_without_keys.item() == 2
    assert torch.isfinite(losses.tau) and torch.isfinite(tau.grad) and tau.grad != 0


def test_a_batch_without_valid_queries_has_loss_zero_and_no_gradient():
    case = {**example(), "query_ids": torch.full((5,), 9), "key_ids": torch.full((10,), 9)}
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    losses = both(case, case["similarity"], tau)
    losses.tau.backward()
    assert losses.tau == 0 and tau.grad == 0 and losses.queries_without_keys == 5 and losses.gml > 0


@pytest.mark.parametrize("tau", [1e-3, 0.01, 0.1, 1.0])
def test_float32_stays_finite_and_a_query_far_from_its_class_is_still_pulled_towards_it(tau):
    case = example(torch.float32)
    similarity = case["similarity"].clone()
    # Extreme cosines, for a query of the near class and one of a far class.
    similarity[:2] = torch.where(case["runs"].row_class == 0, 1.0, -1.0)
    similarity.requires_grad_()
    log_tau = torch.tensor(tau).log().requires_grad_()
    losses = both(case, similarity, log_tau.exp())
    (losses.gml + losses.tau).backward()
    assert losses.gml.dtype == losses.tau.dtype == torch.float32
    assert torch.isfinite(losses.gml) and torch.isfinite(losses.tau)
    assert torch.isfinite(similarity.grad).all() and torch.isfinite(log_tau.grad)
    own = case["runs"].row_class == 1
    assert (similarity.grad[1, own] < 0).all() and similarity.grad[1, ~own].sum() > 0


def test_a_memory_of_one_class_has_nothing_to_tell_apart():
    case = {**example(), "runs": key_runs([10]), "target": torch.zeros(5, dtype=torch.int64)}
    case["log_prior"] = torch.zeros(1, dtype=torch.float64)
    similarity, tau = case["similarity"].clone().requires_grad_(), torch.tensor(0.1).double().requires_grad_()
    losses = both(case, similarity, tau)
    (losses.gml + losses.tau).backward()
    assert losses.gml == 0 and losses.tau == 0 and not similarity.grad.any() and tau.grad == 0


class LargestResult(TorchDispatchMode):
    """Record the largest number of elements of any operation's result, including the backward pass."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return results


def test_nothing_larger_than_the_similarity_is_made_however_many_the_classes():
    batch, classes = 4, 300
    runs = key_runs([2] * classes)
    similarity = torch.rand(batch, 2 * classes).requires_grad_()
    tau = torch.tensor(0.1, requires_grad=True)
    ids = {"query_ids": torch.arange(batch), "key_ids": -torch.arange(1, 2 * classes + 1)}
    with LargestResult() as largest:
        losses = contrast_losses(
            similarity, runs, torch.arange(batch), torch.full((classes,), 1 / classes).log(), tau, **ids
        )
        (losses.gml + losses.tau).backward()
    assert largest.elements == similarity.numel()


@pytest.mark.slow
def test_the_whole_is_one_graph_without_a_value_read_back():
    case = example()
    whole = torch.compile(lambda s, t: both(case, s, t), backend="aot_eager", fullgraph=True)
    results = []
    for call in (whole, lambda s, t: both(case, s, t)):
        similarity, tau = case["similarity"].clone().requires_grad_(), torch.tensor(0.2).double().requires_grad_()
        losses = call(similarity, tau)
        (losses.gml + losses.tau).backward()
        results.append([losses.gml.detach(), losses.tau.detach(), similarity.grad, tau.grad])
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("tau", "total"), [(0.1, 6.24710404068110), (0.5, 2.19736385187310)])
def test_the_golden_fact_g2_of_both_losses_together(tau, total):
    queries, keys = (
        torch.tensor(rows, dtype=torch.float64)
        for rows in ([[0.8, 0.6], [0.0, -1.0]], [[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]])
    )
    log_prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    ids = {"query_ids": torch.tensor([7, 3]), "key_ids": torch.tensor([7, 1, 2, 4])}
    losses = contrast_losses(queries @ keys.T, key_runs([2, 1, 1]), torch.tensor([0, 2]), log_prior, tau, **ids)
    assert (losses.gml + losses.tau).item() == pytest.approx(total, rel=0, abs=1e-10)

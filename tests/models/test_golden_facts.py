"""The golden facts G1 to G5: values computed by hand in float64, verified with the official code, to 1e-10."""

import pytest
import torch

from models.contrast.gml_reference import gml_loss, mixture_log_scores, other_sample_mask
from models.contrast.queues import ClassQueues, queue_lengths
from models.losses.adjusted_cross_entropy import adjusted_cross_entropy
from models.losses.distillation import distillation_loss
from models.prior import log_class_prior

EXACT = {"rel": 0, "abs": 1e-10}
LOG_PRIOR = torch.tensor(log_class_prior([5, 3, 2]))
QUERIES = torch.tensor([[0.8, 0.6], [0.0, -1.0]], dtype=torch.float64)
TARGET = torch.tensor([0, 2])
KEYS = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-0.8, 0.6]], dtype=torch.float64)
ROW_CLASS = torch.tensor([0, 0, 1, 2])
QUERY_IDS = torch.tensor([7, 3])
KEY_IDS = torch.tensor([7, 1, 2, 4])


def loss(tau, *, queries=QUERIES, keys=KEYS, target=TARGET, strength=1.0, mask=None):
    return gml_loss(queries @ keys.T, ROW_CLASS, target, LOG_PRIOR, tau, strength, mask)


@pytest.mark.parametrize(
    ("tau", "rows", "mean"),
    [
        (0.1, (0.02691779231377, 6.22551368461287), 3.12621573846332),
        (0.5, (0.32004987422582, 1.89642569249185), 1.10823778335883),
    ],
)
def test_g1_the_gml_loss_of_equation_4(tau, rows, mean):
    for row in range(2):
        single = loss(tau, queries=QUERIES[row : row + 1], target=TARGET[row : row + 1])
        assert single.item() == pytest.approx(rows[row], **EXACT)
    assert loss(tau).item() == pytest.approx(mean, **EXACT)


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        (0.1, [[9.090753560328, 6, -2.8], [-0.692811774187, -10, -6]]),
        (0.5, [[1.77274575662, 1.2, -0.56]]),
    ],
)
def test_g1_the_class_scores_are_log_mean_exps(tau, expected):
    scores, keys = mixture_log_scores(QUERIES @ KEYS.T, ROW_CLASS, 3, tau)
    for row, values in zip(scores.tolist(), expected, strict=False):
        assert row == pytest.approx(values, **EXACT)
    assert keys.tolist() == [[2, 1, 1]] * 2


@pytest.mark.parametrize(
    ("tau", "mean", "slope"),
    [(0.1, 3.12088830221778, -2.96341101107), (0.5, 1.08912606851427, -0.19749802628)],
)
def test_g2_the_temperature_loss_excludes_the_querys_own_image(tau, mean, slope):
    log_tau = torch.tensor(tau, dtype=torch.float64).log().requires_grad_()
    value = loss(log_tau.exp(), mask=other_sample_mask(QUERY_IDS, KEY_IDS))
    value.backward()
    assert value.item() == pytest.approx(mean, **EXACT)
    assert log_tau.grad.item() == pytest.approx(slope, **EXACT)


def test_g2_encoder_gradients_come_from_the_gml_term_alone():
    queries, keys = QUERIES.clone().requires_grad_(), KEYS.clone().requires_grad_()
    similarity = queries @ keys.T
    mask = other_sample_mask(QUERY_IDS, KEY_IDS)
    total = gml_loss(similarity, ROW_CLASS, TARGET, LOG_PRIOR, 0.5) + gml_loss(
        similarity.detach(), ROW_CLASS, TARGET, LOG_PRIOR, 0.5, mask=mask
    )
    total.backward()
    assert total.item() == pytest.approx(2.19736385187310, **EXACT)
    # The mean over two queries halves each query's gradient; the fact states the gradients of the mean.
    assert queries.grad[1].tolist() == pytest.approx([1.378334321955, -0.308150417549], **EXACT)
    assert keys.grad[0].tolist() == pytest.approx([-0.092174154795, -0.692084901421], **EXACT)


def test_g2_a_query_without_another_key_is_excluded_without_nan():
    log_tau = torch.tensor(0.5, dtype=torch.float64).log().requires_grad_()
    value = loss(log_tau.exp(), mask=other_sample_mask(torch.tensor([7, 4]), KEY_IDS))
    value.backward()
    assert value.item() == pytest.approx(0.28182644453669, **EXACT)
    assert torch.isfinite(log_tau.grad)


@pytest.mark.parametrize(
    ("strength", "mean"), [(0.0, 0.87210730561411), (0.2, 0.91026761488948), (1.0, 1.10823778335883)]
)
def test_g3_the_strength_of_equation_10(strength, mean):
    assert loss(0.5, strength=strength).item() == pytest.approx(mean, **EXACT)


@pytest.mark.parametrize(
    ("counts", "total", "minimum", "lengths"),
    [
        ((50, 12, 3), 16, 2, [10, 4, 2]),
        ((5, 3, 2), 8, 1, [4, 2, 2]),
        ((6, 3, 1), 12, 2, [6, 4, 2]),
    ],
)
def test_g4_queue_lengths_are_the_ceiling_of_the_cumulative_equation_5(counts, total, minimum, lengths):
    assert queue_lengths(counts, total, minimum) == lengths


@pytest.mark.parametrize(("minimum", "message"), [(6, "below minimum k_m"), (0, "at least 1")])
def test_g4_a_memory_that_is_too_small_is_rejected(minimum, message):
    with pytest.raises(ValueError, match=message):
        queue_lengths((50, 12, 3), 16, minimum)


def test_g4_enqueue_fills_each_class_round_robin_and_drops_what_does_not_fit():
    queues = ClassQueues((50, 12, 3), 16, 2, dim=1)
    ids = torch.arange(100, 111)
    queues.enqueue(ids[:5, None].float(), torch.tensor([0, 2, 2, 1, 2]), ids[:5])
    assert {slot: int(queues.sample_ids[slot]) for slot in (0, 10, 14, 15)} == {0: 100, 10: 103, 14: 101, 15: 102}
    assert queues.pointers.tolist() == [1, 1, 0]
    queues.enqueue(ids[5:, None].float(), torch.tensor([2, 1, 1, 1, 1, 1]), ids[5:])
    assert queues.sample_ids[10:15].tolist() == [109, 106, 107, 108, 105]
    assert 104 not in queues.sample_ids and 110 not in queues.sample_ids
    assert queues.pointers.tolist() == [1, 1, 1]
    stored = queues.sample_ids >= 0
    assert torch.equal(queues.features[stored, 0], queues.sample_ids[stored].float())


STUDENT_COSINES = torch.tensor([[0.6, 0.8, 0.28], [1.0, 0.0, -0.6]], dtype=torch.float64)
TEACHER_COSINES = torch.tensor([[0.9, 0.1, -0.2], [0.3, 0.2, 0.6]], dtype=torch.float64)


def test_g5_the_cosines_of_the_classifier():
    from models.networks.cosine_classifier import CosineClassifier

    classifier = CosineClassifier(2, 3).double()
    with torch.no_grad():
        classifier.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 4.0]]))
    cosines = classifier(torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64))
    assert torch.allclose(cosines, STUDENT_COSINES, rtol=0, atol=1e-12)


def test_g5_the_adjusted_cross_entropy_of_equation_6():
    rows = [
        adjusted_cross_entropy(STUDENT_COSINES[i : i + 1] * 30, TARGET[i : i + 1], LOG_PRIOR).item() for i in range(2)
    ]
    assert rows == pytest.approx([5.49329723112534, 48.91629073187421], **EXACT)
    assert adjusted_cross_entropy(STUDENT_COSINES * 30, TARGET, LOG_PRIOR).item() == pytest.approx(
        27.20479398149978, **EXACT
    )


def test_g5_distillation():
    assert distillation_loss(STUDENT_COSINES * 30, TEACHER_COSINES * 30, 4.0).item() == pytest.approx(
        95.4233072569181, **EXACT
    )
    assert distillation_loss(STUDENT_COSINES, TEACHER_COSINES, 4.0).item() == pytest.approx(0.2014326499437, **EXACT)


@pytest.mark.parametrize(
    ("gamma", "beta", "alpha", "tau", "total"),
    [(1.0, 1.0, 1.0, 0.5, 124.825465090296), (0.5, 2.0, 0.0, 0.1, 26.096605072112)],
)
def test_g5_all_terms_together(gamma, beta, alpha, tau, total):
    classification = adjusted_cross_entropy(STUDENT_COSINES * 30, TARGET, LOG_PRIOR)
    contrast = loss(tau) + loss(tau, mask=other_sample_mask(QUERY_IDS, KEY_IDS))
    distilled = distillation_loss(STUDENT_COSINES * 30, TEACHER_COSINES * 30, 4.0)
    assert (gamma * classification + beta * contrast + alpha * distilled).item() == pytest.approx(total, **EXACT)

"""L_GML against constant text features: golden V1, no queue, L_tau equal to L_GML, centres that no step changes."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.contrast.gml import TextCentres, UnitVectors
from models.contrast.gml_reference import mixture_log_scores
from models.contrast.terms import ContrastInputs
from models.networks.projection_head import ProjectionHead
from models.objectives.contrast import ContrastObjective
from models.objectives.student_weights import StudentWeights
from models.prior import log_class_prior
from tests.support.small_objectives import COUNTS, IDS, LOG_PRIOR, TARGET, network, student, views

ROW_CLASS = torch.tensor([0, 0, 0, 1, 2, 2])
ROWS = F.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(5)), dim=1)


def centres(width, train_tau_g=True, rows=ROWS, heads=None):
    torch.manual_seed(6)
    heads = heads or (ProjectionHead(width, 16, 8), ProjectionHead(rows.shape[1], 16, 8))
    return TextCentres(*heads, rows, ROW_CLASS, LOG_PRIOR, 0.2, train_tau_g)


@pytest.mark.parametrize(
    ("tau", "rows", "mean"),
    [
        (0.07, (3.66337037697e-4, 5.295579518020573), 2.647972927529135),
        (0.5, (0.191907936338295, 1.072742681382572), 0.632325308860433),
    ],
)
def test_v1_the_gml_loss_of_text_centres_in_float64(tau, rows, mean):
    texts = torch.tensor([[1, 0, 0], [0.8, 0.6, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    log_prior = torch.tensor(log_class_prior([6, 3, 1]))
    term = TextCentres(
        UnitVectors(), UnitVectors(), texts, torch.tensor([0, 0, 1, 2]), log_prior, tau, train_tau_g=True
    )
    images, target = torch.tensor([[2, 1, 0], [0, 1, 2]], dtype=torch.float64), torch.tensor([0, 1])
    # Sample ids 0 and 1 are those of no text: no pair is left out, so that L_tau equals L_GML.
    for chosen, expected in ((slice(0, 1), rows[0]), (slice(1, 2), rows[1]), (slice(0, 2), mean)):
        losses = term(ContrastInputs(images[None, chosen], target[chosen], torch.arange(2)[chosen]))
        assert losses["gml"].item() == pytest.approx(expected, rel=1e-10)
        assert losses["tau"].item() == pytest.approx(expected, rel=1e-10)
        assert losses["loss"].item() == pytest.approx(2 * expected, rel=1e-10)


def test_v1_the_class_scores_of_text_centres():
    texts = torch.tensor([[1, 0, 0], [0.8, 0.6, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    images = F.normalize(torch.tensor([[2, 1, 0], [0, 1, 2]], dtype=torch.float64), dim=1)
    scores, _ = mixture_log_scores(images @ texts.T, torch.tensor([0, 0, 1, 2]), 3, 0.07)
    golden = [[13.6079520284807, 6.3887656499994, 0], [3.1615203811965, 6.3887656499994, 12.777531299998797]]
    assert scores.tolist() == [pytest.approx(row, rel=0, abs=1e-12) for row in golden]


def test_centres_stay_constant_over_a_step_while_both_heads_are_trained():
    term = centres(7).train()
    before, features = copy.deepcopy(term), torch.randn(1, 6, 7, requires_grad=True)
    optimiser = torch.optim.SGD(term.parameters(), lr=0.1)
    term(ContrastInputs(features, TARGET, IDS))["loss"].backward()
    optimiser.step()
    term.after_step()
    for name in ("features", "row_class", "starts", "lengths", "log_prior"):
        assert torch.equal(getattr(term, name), getattr(before, name))
        assert name not in term.state_dict()
    for head in ("query_head", "key_head"):
        weights = [getattr(each, head).layers[0].weight for each in (term, before)]
        assert not torch.equal(*weights)
    assert term.log_tau_g != before.log_tau_g and features.grad.abs().sum() > 0


def test_the_loss_is_that_of_a_mixture_with_as_many_gaussians_as_sentences():
    term = centres(5, heads=(UnitVectors(), UnitVectors()), train_tau_g=False)
    features = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(8))
    kernel = np.exp(F.normalize(features[0].double(), dim=1).numpy() @ ROWS.double().numpy().T / 0.2)
    likelihood = np.stack([kernel[:, ROW_CLASS.numpy() == c].mean(1) for c in range(3)], 1)
    posterior = likelihood * np.exp(LOG_PRIOR.numpy())
    own = posterior[np.arange(6), TARGET.numpy()] / posterior.sum(1)
    losses = term(ContrastInputs(features, TARGET, IDS))
    assert losses["loss"].item() == pytest.approx(-np.log(own).mean(), rel=1e-5)
    assert set(losses) == {"loss", "gml", "tau_g"}


def test_the_mean_over_micro_batches_is_the_loss_of_the_batch():
    term = centres(5, heads=(UnitVectors(), UnitVectors()))
    features = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(9))
    parts = [term(ContrastInputs(features[:, i : i + 3], TARGET[i : i + 3], IDS[i : i + 3]))["loss"] for i in (0, 3)]
    whole = term(ContrastInputs(features, TARGET, IDS))["loss"]
    assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-6)


def test_a_class_without_a_row_and_unsorted_rows_are_refused():
    for row_class in (torch.tensor([0, 0, 2]), torch.tensor([0, 2, 1]), torch.tensor([0, 1, 3])):
        with pytest.raises(
            ValueError, match=r"row_class is not sorted, or its classes are not 0 to 2, each with a row"
        ):
            TextCentres(UnitVectors(), UnitVectors(), ROWS[:3], row_class, LOG_PRIOR, 0.1)


def test_text_alone_runs_the_student_on_two_views_and_no_teacher():
    model = network()
    weights = StudentWeights(1.0, 1.0, 0.0, 4.0, 1.0)
    objective = ContrastObjective(model, None, LOG_PRIOR, weights, centres(model.feature_dim)).train()
    assert objective.views == 2 and objective.teacher is None
    parts = objective(views(2), TARGET, IDS)
    total = parts["classification"] + parts["gml"] + parts["tau"]
    assert parts["loss"].item() == pytest.approx(total.item(), rel=1e-6)
    parts["loss"].backward()
    assert objective.log_prior is not None and not any("features" in name for name in objective.state_dict())


def test_image_and_text_centres_are_two_terms_of_the_same_weight():
    alone = student(train_tau_g=False)
    both = student(train_tau_g=False, contrast_encoder="teacher_and_text", text=centres(64, train_tau_g=False))
    assert len(COUNTS) == 3 and both.queues.features.shape == alone.queues.features.shape
    parts = [objective(views(), TARGET, IDS) for objective in (alone, both)]
    assert parts[1]["gml"].item() == pytest.approx(parts[0]["gml"].item(), rel=1e-6)
    assert not math.isclose(parts[1]["text_gml"].item(), parts[1]["gml"].item())
    difference = parts[1]["loss"] - parts[0]["loss"]
    assert difference.item() == pytest.approx(1.5 * parts[1]["text_gml"].item(), rel=1e-4)

"""The head that a second stage starts from has the logits of the student's classifier."""

from __future__ import annotations

import torch

from models.networks.cosine_classifier import CausalClassifier, ImageClassifier, LinearClassifier
from pipeline.second_stage.refit import _student_head


def trained(head, tau_s=1.0):
    torch.manual_seed(0)
    return ImageClassifier("resnet20", 4, tau_s, **({"head": head} if head else {})).eval()


def test_a_cosine_classifier_is_exact():
    model, features = trained(None, 0.1), torch.randn(6, 64)
    assert torch.allclose(_student_head(model)(features), model.classifier(features) / 0.1, atol=1e-5)


def test_a_linear_classifier_is_exact_for_features_of_mean_length():
    model = trained(LinearClassifier)
    model.classifier.length.fill_(3.0)
    features = 3.0 * torch.nn.functional.normalize(torch.randn(6, 64), dim=1)
    assert torch.allclose(_student_head(model)(features), model.classifier(features), atol=1e-5)


def test_a_causal_classifier_is_exact_for_features_whose_parts_have_equal_lengths():
    model = trained(CausalClassifier)
    model.classifier.mean_direction.normal_()
    features = torch.nn.functional.normalize(torch.randn(6, 2, 32), dim=2).flatten(1)
    assert torch.allclose(_student_head(model)(5 * features), model.classifier(features), atol=1e-5)

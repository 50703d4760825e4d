"""VL-LTR's second stage: its logits against numpy in float64, and that it learns from sentences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.language_guided import LanguageGuided, train_language_guided


def unit(rows, width, seed):
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("width", [4, 7])
def test_logits_of_sentences_equal_the_formula_with_classes_of_different_lengths(width):
    sentences, row_class, images = unit(5, 4, 0), torch.tensor([0, 0, 0, 1, 2]), unit(6, width, 1)
    model = LanguageGuided(width, sentences, row_class)
    if width == 4:
        assert torch.equal(model.query.weight, torch.eye(4)) and torch.equal(model.key.weight, torch.eye(4))
    torch.nn.init.normal_(model.query.weight, generator=torch.Generator().manual_seed(2))
    torch.nn.init.normal_(model.key.weight, generator=torch.Generator().manual_seed(3))
    _, logits = model(images)
    query, key = (layer.weight.detach().double().numpy() for layer in (model.query, model.key))
    for image, row in zip(images.double().numpy(), logits.detach().numpy(), strict=True):
        for label in range(3):
            own = sentences[row_class == label].double().numpy()
            weights = np.exp(own @ key.T @ query @ image / 2)  # √D is 2
            vector = (weights / weights.sum()) @ own
            compared = image if width == 4 else query @ image
            expected = vector @ compared / np.linalg.norm(vector) / np.linalg.norm(compared) / 0.07
            assert abs(row[label] - expected) < 1e-4


def test_probabilities_sum_to_one_and_weigh_the_sentences_four_times_the_network():
    model = LanguageGuided(4, unit(3, 4, 0), torch.arange(3))
    images = unit(6, 4, 1)
    network, text = (logits.double().softmax(1) for logits in model(images))
    found = model.log_probabilities(images).double().exp()
    assert torch.allclose(found, 0.2 * network + 0.8 * text, atol=1e-6)


def test_images_of_another_space_than_the_text_are_classified_after_training():
    centres, labels = unit(3, 6, 2), torch.arange(3).repeat_interleave(torch.tensor([2000, 800, 200]))
    features = centres[labels] + 0.1 * torch.randn(3000, 6, generator=torch.Generator().manual_seed(3))
    model = train_language_guided(features.half(), labels, unit(4, 5, 4), torch.tensor([0, 0, 1, 2]), seed=0)
    with torch.inference_mode():
        assert (model.log_probabilities(centres).argmax(1) == torch.arange(3)).all()
        assert (model(centres)[1].argmax(1) == torch.arange(3)).all()  # the projection learns, not the network alone

"""Logits and metrics of a trained network on a split, for both target priors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.data.class_prior import Prior
from pipeline.data.dataset import AnyImages
from pipeline.evaluation.metrics import adjusted_probabilities, prediction_metrics
from pipeline.model_io.checkpoint import check_image, check_inputs, load_model
from pipeline.model_io.inference import EVALUATION_BATCH, NotFiniteError, balanced_logits
from pipeline.params import EvaluateParams, ImageParams
from pipeline.shared.errors import StageError

TARGET_PRIORS = {"balanced": 0.0, "train": 1.0}


def network_logits(
    folder: Path, stage: str, test: AnyImages, image: ImageParams, prior: Prior, device: torch.device
) -> np.ndarray:
    """Balanced logits [N,C] of the network that `stage` wrote to `folder`, for all images of `test`.

    Raises StageError if a logit is not finite, and the errors of load_model and check_image.
    """
    model, config = load_model(folder, stage)
    check_image(config, image, folder)
    check_inputs(config, getattr(test, "encoder", None), folder)
    model = model.to(device, memory_format=torch.channels_last)
    images = test.batches(torch.arange(len(test)), EVALUATION_BATCH)
    try:
        return balanced_logits(model, images, image, device, prior.balanced_shift(config.adjustment)).numpy()
    except NotFiniteError as error:
        raise StageError(
            f"{folder}: {error}: training diverged; lower {stage}.learning_rate and run `dvc repro -f {stage}`"
        ) from None


def probabilities_by_target_prior(logits: np.ndarray, prior: Prior) -> dict[str, np.ndarray]:
    """Probabilities [N,C] of balanced logits [N,C] for each target prior."""
    log_prior = np.array(prior.log_prior)
    return {name: adjusted_probabilities(logits, log_prior, strength) for name, strength in TARGET_PRIORS.items()}


def network_metrics(logits: np.ndarray, labels: np.ndarray, prior: Prior, params: EvaluateParams) -> dict[str, Any]:
    """Metrics of balanced logits [N,C] with labels [N]: target prior → metric → value."""
    classes = len(prior.classes)
    targets = {"balanced": np.full(classes, 1 / classes), "train": np.array(prior.p)}
    return {
        name: prediction_metrics(p, labels, prior.groups, targets[name], bins=params.ece_bins, top_k=params.top_k)
        for name, p in probabilities_by_target_prior(logits, prior).items()
    }

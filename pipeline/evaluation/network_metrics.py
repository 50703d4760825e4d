"""Logits and metrics of a trained network on a split, for both target priors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from models.networks.cosine_classifier import ImageClassifier
from pipeline.data.class_prior import Prior
from pipeline.data.dataset import AnyImages
from pipeline.evaluation.metrics import adjusted_probabilities, prediction_metrics
from pipeline.model_io.checkpoint import ModelConfig, check_image, check_inputs, load_config, load_model
from pipeline.model_io.inference import EVALUATION_BATCH, balanced_logits, divergence_named
from pipeline.params import EvaluateParams, ImageParams

TARGET_PRIORS = {"balanced": 0.0, "train": 1.0}
Part = Literal["cosine", "memory"]


def student_parts(
    folder: Path, test: AnyImages, image: ImageParams, prior: Prior, device: torch.device, refitted: bool = False
) -> dict[str, np.ndarray]:
    """Compute balanced logits [N,C] of the student's cosine classifier and of its memory; empty if it has only one.

    refitted: a second stage replaces its classifier; then the logits of the student before it.
    """
    if refitted:
        return {"student_first_stage": network_logits(folder, "student", test, image, prior, device)}
    memory = load_config(folder, "student").memory
    if not memory or memory["classifier"] != "both":
        return {}
    parts: tuple[Part, ...] = ("cosine", "memory")
    return {
        f"student_{part}_alone": network_logits(folder, "student", test, image, prior, device, part) for part in parts
    }


def take_part(model: ImageClassifier, config: ModelConfig, part: Part) -> ModelConfig:
    """Reduce a network with a cosine classifier and a memory to one of the two; returns its config."""
    memory = model.memory
    assert memory is not None and config.memory
    if part == "cosine":
        memory.weight = 0.0
        return config
    memory.tau, memory.weight = config.memory["alone"]["tau"], config.memory["alone"]["weight"]
    model.cosine = False
    return replace(config, adjustment=None)


def network_logits(
    folder: Path,
    stage: str,
    test: AnyImages,
    image: ImageParams,
    prior: Prior,
    device: torch.device,
    part: Part | None = None,
) -> np.ndarray:
    """Balanced logits [N,C] of the network that `stage` wrote to `folder`, for all images of `test`.

    part: the classifier to use in a network with a cosine classifier and a memory; None for both. Raises StageError if a logit
    is not finite, and the errors of load_model and check_image.
    """
    model, config = load_model(folder, stage)
    if part:
        config = take_part(model, config, part)
    check_image(config, image, folder)
    check_inputs(config, getattr(test, "encoder", None), folder)
    model = model.to(device, memory_format=torch.channels_last)
    images = test.batches(torch.arange(len(test)), EVALUATION_BATCH)
    with divergence_named(folder, stage):
        return balanced_logits(model, images, image, device, prior.balanced_shift(config.adjustment)).numpy()


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

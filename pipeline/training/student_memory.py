"""Build the memory of the student: rows from training features; tau and weight fitted on the validation split."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.distributed import rank
from models.networks.memory import FeatureMemory, build_memory
from models.networks.memory_fit import LEAST_WEIGHT, MINIMUM_IMAGES, MemoryFit, fit_memory
from pipeline.data.class_prior import Prior
from pipeline.features.stored import FeatureImages, load_features
from pipeline.model_io.checkpoint import ModelConfig, build_model, few_images, save_model
from pipeline.model_io.inference import balanced_logits
from pipeline.params import ImageParams, MemoryParams, Params
from pipeline.shared.artifacts import as_csv, whole_folder, write_file
from pipeline.shared.errors import ParamsError
from pipeline.training.history import as_jsonl
from serving.shared.terminal import print

Weights = Mapping[str, Tensor]


class StudentMemory:
    """Adds a memory to trained weights and their config. train: the split whose features become the rows.

    Raises ParamsError if student.memory.rows is below the number of classes.
    """

    def __init__(
        self, section: MemoryParams, train: FeatureImages, validation: FeatureImages, prior: Prior, image: ImageParams
    ) -> None:
        self._section, self._prior, self._image = section, prior, image
        try:
            self._rows = build_memory(train.images[:, 0], train.labels, len(prior.classes), section.rows)
        except ValueError as error:
            raise ParamsError(f"student.memory.rows {error}") from None
        self._images = len(train)
        self._features, self._labels = validation.images[:, 0], validation.labels
        if len(validation) < MINIMUM_IMAGES and rank() == 0:
            print(
                f"student  warning: tau and weight of student.memory are not fitted ({few_images(len(validation))}); raise "
                "data.validation_per_class or data.validation_share",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def add(self, weights: Weights, config: ModelConfig) -> tuple[Weights, ModelConfig]:
        """Return weights and config of the network with the memory. The config records both fits."""
        alone = self._fit(torch.zeros(len(self._labels), config.classes), LEAST_WEIGHT)
        used = alone
        if self._section.classifier == "both":
            used = self._fit(self._trained_logits(weights, config))
        record: dict[str, Any] = {
            "classifier": self._section.classifier, "rows": len(self._rows.rows), "images": self._images,
            "tau": used.tau, "weight": used.weight, "alone": {"tau": alone.tau, "weight": alone.weight},
            "validation_images": used.images,
        }  # fmt: skip
        stored = {f"memory.{name}": tensor for name, tensor in self._rows._asdict().items()}
        return {**weights, **stored}, replace(config, memory=record)

    def alone(self, config: ModelConfig) -> tuple[Weights, ModelConfig, dict[str, float]]:
        """Return weights and config of a network with only the memory, and a record that replaces the record of an epoch."""
        weights, config = self.add({}, replace(config, adapter=0, adjustment=None))
        assert config.memory
        record: dict[str, float] = {"epoch": 0}
        if len(self._labels):
            memory = FeatureMemory(self._rows, config.classes, config.memory["tau"], config.memory["weight"])
            right = [memory(part).argmax(1) for part in self._features.split(512)]
            record["validation_accuracy"] = float((torch.cat(right) == self._labels).float().mean())
        return weights, config, record

    def _fit(self, logits: Tensor, least_weight: float = 0.0) -> MemoryFit:
        return fit_memory(self._rows, self._features, self._labels, logits, least_weight)

    def _trained_logits(self, weights: Weights, config: ModelConfig) -> Tensor:
        if not len(self._labels):
            return torch.zeros(0, config.classes)
        with torch.random.fork_rng(devices=[]):
            model = build_model(config, "student.backbone")
        model.load_state_dict({name: tensor.cpu() for name, tensor in weights.items()})
        shift = self._prior.balanced_shift(config.adjustment)
        return balanced_logits(model, self._features, self._image, torch.device("cpu"), shift)


def write_memory(
    section: MemoryParams, config: ModelConfig, params: Params, prior: Prior, output: Path
) -> tuple[dict[str, float], Path, dict[str, Any] | None]:
    """Write a student with only the memory (rank 0 writes). Returns its record, the output, and the record of the memory."""
    train, validation = load_features(params, "train"), load_features(params, "validation")
    memory = StudentMemory(section, train, validation, prior, params.image)
    weights, config, record = memory.alone(config)
    if rank() == 0:
        with whole_folder(output) as folder:
            save_model(weights, config, folder)
            write_file(folder / "metrics.jsonl", as_jsonl([record]))
            write_file(folder / "history.csv", as_csv([record]))
    return record, output, config.memory

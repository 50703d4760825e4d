"""Common setup of both sides of benchmarks.training: the recipe, the images of a round, the initial weights."""

from __future__ import annotations

import argparse
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from models.networks.cosine_classifier import ImageClassifier
from models.objectives.student import StudentObjective
from models.objectives.student_weights import StudentWeights
from models.objectives.teacher import TeacherObjective
from pipeline.data.dataset import Images
from pipeline.data.profiles import choose_images, class_sizes
from pipeline.params import PARAMS_FILE, Params, parse_params, read_yaml

CLASSES = 10
IMBALANCE = 100


@dataclass(frozen=True)
class Setup:
    """counts: images per class of the whole long-tailed split; train, test: the images of a round."""

    params: Params
    counts: list[int]
    train: Images
    test: Images
    device: torch.device
    workers: int

    @property
    def log_prior(self) -> Tensor:
        """Log class prior, [C]."""
        return (torch.tensor(self.counts) / sum(self.counts)).log()


def setup_of(arguments: argparse.Namespace) -> Setup:
    """Return the setup for the command's arguments."""
    params = recipe(arguments)
    pixels, labels = pack(arguments.data, "train") if arguments.data else generate_images(20_000, 0)
    counts = class_sizes("exponential", np.bincount(labels).tolist(), IMBALANCE)
    long_tailed = np.concatenate(choose_images(labels, counts, 0))
    batch = params.student.batch_size
    steps = arguments.steps or len(long_tailed) // batch
    chosen = np.random.default_rng(0).permutation(long_tailed)[: steps * batch]
    test_pixels, test_labels = pack(arguments.data, "test") if arguments.data else generate_images(8_000, 1)
    share = len(chosen) / len(long_tailed)
    test_chosen = np.random.default_rng(0).permutation(len(test_labels))[: max(1, round(len(test_labels) * share))]
    return Setup(
        params, counts, images_of(pixels, labels, chosen), images_of(test_pixels, test_labels, test_chosen),
        torch.device(arguments.device), arguments.workers,
    )  # fmt: skip


def recipe(arguments: argparse.Namespace) -> Params:
    """Return params.yaml with the official CIFAR recipe: 200 epochs, lr 0.1, AutoAugment, Cutout, K 4096."""
    content = read_yaml(PARAMS_FILE)
    content["image"] = {
        "size": 32, "resize_to": 32, "mean": [0.4914, 0.4822, 0.4465], "std": [0.2023, 0.1994, 0.2010],
    }  # fmt: skip
    content["engine"] = {**content.get("engine", {}), "precision": arguments.precision}
    schedule = {"kind": "steps", "warmup_epochs": 5, "milestones": [160, 180]}
    augment = {"crop_padding": 4, "flip": True, "policy": "autoaugment", "cutout": 16}
    for name in ("teacher", "student"):
        section = content[name]
        section.update(
            epochs=200,
            batch_size=arguments.batch,
            learning_rate=0.1,
            weight_decay=5e-4,
            backbone=getattr(arguments, name),
        )
        section["schedule"] = {**section["schedule"], **schedule}
        section["augment"] = {**section["augment"], **augment}
    content["student"].update(
        gamma=1.0, beta=1.0, alpha=1.0, tau_g=0.1, train_tau_g=True, queue_total=4096, queue_minimum=2
    )
    return parse_params(content, PARAMS_FILE)


def pack(folder: Path, split: str) -> tuple[list[bytes], np.ndarray]:
    """Load encoded images and labels of the CIFAR-10 pack."""
    rows = pq.read_table(folder / f"cifar10-{split}.parquet", columns=["image", "label"])
    return rows.column("image").to_pylist(), rows.column("label").to_numpy().astype(np.int64)


def generate_images(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Generate smooth noise uint8 [N,3,32,32] and cyclic labels."""
    coarse = torch.rand(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = F.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1)
    return (smooth * 255).to(torch.uint8).numpy(), np.arange(count) % CLASSES


def images_of(pixels: list[bytes] | np.ndarray, labels: np.ndarray, chosen: np.ndarray) -> Images:
    """Return the chosen images, decoded if they are encoded."""
    if isinstance(pixels, np.ndarray):
        stacked = torch.from_numpy(pixels[chosen])
    else:
        decoded = (np.asarray(Image.open(io.BytesIO(pixels[i])).convert("RGB")) for i in chosen)
        stacked = torch.from_numpy(np.stack(list(decoded))).permute(0, 3, 1, 2).contiguous()
    names = [str(i) for i in chosen]
    return Images(stacked, torch.from_numpy(labels[chosen]), names, names, source=None)


def objective_of(setup: Setup, name: str) -> TeacherObjective | StudentObjective:
    """Return the engine's objective of a stage, from seed 0; the student's untrained teacher costs the same."""
    params = setup.params
    torch.manual_seed(0)
    teacher = ImageClassifier(params.teacher.backbone, CLASSES, params.teacher.tau_s)
    if name == "teacher":
        return TeacherObjective(teacher, setup.log_prior)
    student = params.student
    weights = StudentWeights(
        student.gamma, student.beta, student.alpha, student.distillation_temperature, student.prior_strength
    )
    model = ImageClassifier(student.backbone, CLASSES, student.tau_s)
    return StudentObjective(
        model, teacher, setup.log_prior, setup.counts, weights,
        tau_g=student.tau_g, train_tau_g=student.train_tau_g, queue_total=student.queue_total,
        queue_minimum=student.queue_minimum, projection_dim=student.projection_dim,
    )  # fmt: skip

"""Small training runs for tests: three classes of 8x8 images that differ in their bright channel."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from models.contrast.kcl import KPositiveContrast, TargetedContrast
from models.contrast.memories import FifoQueue
from models.contrast.proco import ProCo
from models.contrast.supcon import SupCon
from models.experts.backbone import expert_backbone
from models.losses.class_loss import ClassLoss, FocalLoss, LDAMLoss, Weighting
from models.networks.cosine_classifier import CausalClassifier, ImageClassifier, LinearClassifier
from models.networks.projection_head import ProjectionHead
from models.objectives.contrast import ContrastObjective
from models.objectives.experts import BbnObjective, ExpertsObjective, Ride
from models.objectives.hybrid import HybridObjective
from models.objectives.objective import Objective
from models.objectives.student import StudentObjective
from models.objectives.student_weights import StudentWeights
from models.objectives.teacher import TeacherObjective
from pipeline.data.dataset import Images
from pipeline.params import AugmentParams, EngineParams, ImageParams, LearningRateParams, TrainingParams
from pipeline.training.engine import Training
from pipeline.training.step import Step

IMAGE = ImageParams(size=8, resize_to=8, mean=[0.5] * 3, std=[0.25] * 3)
CPU = torch.device("cpu")


def made_images(count: int, seed: int = 0) -> Images:
    """Generate `count` images with cyclic classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    images = torch.randint(0, 100, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images[torch.arange(count), labels] += 120
    return Images(images, labels, [str(i) for i in range(count)], [str(i) for i in range(count)], source=None)


def training_params(**changes) -> TrainingParams:
    """Return params of two epochs with batches of eight."""
    values = {
        "backbone": "resnet20",
        "tau_s": 1 / 30,
        "epochs": 2,
        "batch_size": 8,
        "learning_rate": 0.05,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "schedule": LearningRateParams(kind="cosine", warmup_epochs=0),
        "augment": AugmentParams(crop_padding=1, flip=True, cutout=2),
    }
    return TrainingParams(**{**values, **changes})


def made_objective(stage: str, seed: int = 0) -> Objective:
    """Return the objective of a stage, initialised from a seed.

    `momentum`: a student with a momentum encoder. `deferred`: a teacher with class weights in the second half of the epochs
    and a causal classifier. `experts`: a student of two experts, with class weights in the second half. `bbn`: a student that
    draws a second batch, as does `hybrid`. `proco`, `kcl`, `tsc`: a student with that contrast term.
    """
    log_prior = torch.tensor([0.6, 0.3, 0.1]).log()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if stage == "experts":
            model = ImageClassifier(expert_backbone("resnet20", 2, "early", narrow=True), 3, 1 / 30)
            loss = LDAMLoss(log_prior, 0.0, (6, 3, 1), 30, weighting=Weighting((6, 3, 1), 0.9, 0.5))
            return ExpertsObjective(model, Ride(loss, reweight=0.5, diversity=0.45))
        if stage == "bbn":
            return BbnObjective(
                ImageClassifier(expert_backbone("resnet20", 2, "late"), 3, 1.0, head=LinearClassifier), -1.0
            )
        model = ImageClassifier("resnet20", 3, 1 / 30)
        if stage == "proco":
            head, weights = ProjectionHead(64, 64, 8), StudentWeights(1.0, 1.0, 0.0, 4.0, 1.0)
            return ContrastObjective(model, None, log_prior, weights, ProCo(head, log_prior, 8, 0.1))
        if stage == "kcl":
            head, weights = ProjectionHead(64, 64, 8), StudentWeights(1.0, 1.0, 0.0, 4.0, 1.0)
            return ContrastObjective(model, None, log_prior, weights, KPositiveContrast(head, FifoQueue(16, 8)))
        if stage == "tsc":
            head, weights = ProjectionHead(64, 64, 8), StudentWeights(1.0, 1.0, 0.0, 4.0, 1.0)
            return ContrastObjective(model, None, log_prior, weights, TargetedContrast(head, FifoQueue(16, 8), 3))
        if stage == "hybrid":
            return HybridObjective(model, SupCon(ProjectionHead(64, 64, 8), 0.1), ClassLoss(log_prior, 0.0), 1.0, 1.0)
        if stage == "deferred":
            loss = FocalLoss(log_prior, 0.0, 1.0, Weighting((6, 3, 1), 0.9, 0.5))
            return TeacherObjective(ImageClassifier("resnet20", 3, 1.0, head=CausalClassifier), log_prior, loss=loss)
        if stage == "teacher":
            return TeacherObjective(model, log_prior)
        teacher = ImageClassifier("resnet20", 3, 1 / 30)
        momentum = stage == "momentum"
        weights = StudentWeights(1.0, 1.0, 0.0 if momentum else 1.0, 4.0, 1.0)
        return StudentObjective(
            model, teacher, log_prior, (6, 3, 1), weights,
            tau_g=0.1, train_tau_g=True, queue_total=24, queue_minimum=3, projection_dim=8,
            contrast_encoder="momentum" if momentum else "teacher", encoder_momentum=0.9,
        )  # fmt: skip


def made_training(
    stage: str = "teacher",
    seed: int = 0,
    run_folder=None,
    checkpoint_seconds: float = 60.0,
    precision: str = "auto",
    checkpoint_activations: bool = False,
    **changes,
) -> Training:
    """Return a training run of a stage, not yet started."""
    objective = made_objective(stage, seed)
    engine = EngineParams(
        checkpoint_seconds=checkpoint_seconds, precision=precision, checkpoint_activations=checkpoint_activations
    )
    return Training(stage, objective, training_params(**changes), IMAGE, seed, CPU, run_folder, engine)


class NormFree(nn.Module):
    """Replacement of a batch norm that acts on each sample alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def without_batch_norm(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, NormFree())
        else:
            without_batch_norm(child)
    return module


def double_step(stage: str, accumulate: int, augment: AugmentParams) -> Step:
    """Return a float64 step on a network with batch norm only in the key head, which always processes whole queues."""
    objective = made_objective(stage)
    if stage in ("student", "momentum"):
        # All keys of class 2 are of one image: L_tau omits its queries, in every part of the batch.
        objective.queues.sample_ids[objective.queues.row_class == 2] = 5
    for module in objective.batch_modules():
        without_batch_norm(module)
    if stage == "momentum":  # its encoder and key head mirror the others, parameter by parameter
        without_batch_norm(objective.key_head).requires_grad_(False)
        objective.momentum_encoder.requires_grad_(False)
    objective.double()
    params = training_params(accumulate=accumulate, augment=augment)
    step = Step(objective, params, IMAGE, made_images(32), CPU)
    normalise = step.normalise
    step.normalise = lambda views: normalise(views).double()
    return step


RANKS = 2


def in_each_rank(rank: int, work, folder: Path, arguments: tuple) -> None:
    """Run `work` as one rank of a gloo group; save its result in a file of the rank."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS, timeout=timedelta(minutes=2)
    )
    try:
        torch.save(work(*arguments), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def in_ranks(work, folder: Path, *arguments) -> list:
    """Run `work` in a group of two processes; return the result of each rank."""
    mp.spawn(in_each_rank, (work, folder, arguments), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


class PowerCut(Exception):
    """Raised to end a run at an arbitrary step."""

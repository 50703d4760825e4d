"""Features of the training images under the trained student, of several augmented views, stored between runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from models.class_sampler import ClassSampler
from models.networks.autocast import full_precision
from models.networks.cosine_classifier import ImageClassifier
from pipeline.augment import apply_views, draw_views
from pipeline.data.dataset import AnyImages, evaluation_images, normalise, training_images
from pipeline.features.stored import (
    FEATURES,
    HASHES,
    load_features,
    read_shard,
    split_hashes,
    takes_features,
    write_shard,
)
from pipeline.model_io.checkpoint import WEIGHTS
from pipeline.model_io.inference import EVALUATION_BATCH
from pipeline.params import Params
from pipeline.shared.artifacts import sha256_of, sha256_of_json
from pipeline.shared.errors import ParamsError
from pipeline.shared.fingerprint import sha256_of_sources
from pipeline.shared.progress import progress_bar

SHIFT_BATCH = 128
LEAST_SHIFT_STEPS = 20


def training_features(model: ImageClassifier, params: Params, student: Path, seed: int) -> tuple[Tensor, Tensor]:
    """Features float16 [N,V,D] and labels int64 [N] of the training images under `model`, on the CPU.

    student: folder that `model` was loaded from. With a frozen encoder, the V views are the image and its stored views.
    Otherwise each image goes through the network in classifier.views views of student.augment; these features are stored
    beside `student`, and used again for the same student, images and views. With classifier.shift_batch_norm the model's
    statistics of batch norm are estimated first. Raises ParamsError if it has no batch norm.
    """
    if takes_features(params, "student"):
        stored = load_features(params, "train")
        rows = torch.cat([_features(model, part) for part in stored.images.flatten(0, 1).split(EVALUATION_BATCH)])
        return rows.view(*stored.images.shape[:2], -1), stored.labels
    section, views = params.classifier, TrainingViews(params, next(model.parameters()).device, seed)
    if section.shift_batch_norm:
        shift_batch_norm(model, views, seed)
        return views.features(model, section.views), views.labels
    path, hashes = student.with_name(f".{student.name}.features") / "train.safetensors", split_hashes("train")
    key = sha256_of_json(
        {
            "student": sha256_of(student / WEIGHTS), "image": params.image.model_dump(mode="json"), "seed": seed,
            "augment": params.student.augment.model_dump(mode="json"), "views": section.views, "decode": params.stream.decode,
            "code": sha256_of_sources("pipeline/augment/*.py"),
        }
    )  # fmt: skip
    shard = read_shard(path, key)
    if shard is not None and np.array_equal(shard[HASHES].numpy(), hashes):
        return shard[FEATURES], views.labels
    features = views.features(model, section.views)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shard(path, features, hashes, key)
    return features, views.labels


class TrainingViews:
    """Views of the training images by student.augment, without mixing; with classifier.views 0 the images themselves.

    device: of the network. labels: int64 [N] of the images.
    """

    def __init__(self, params: Params, device: torch.device, seed: int) -> None:
        self._image, self._device = params.image, device
        self._augment = params.student.augment if params.classifier.views else None
        self._generator = torch.Generator().manual_seed(seed)
        self._images: AnyImages = (
            training_images(params, device, augment=self._augment)[0]
            if self._augment
            else evaluation_images(params, "train")
        )
        self.labels = self._images.labels

    def draw(self, chosen: Tensor) -> Tensor:
        """New views of the images `chosen` int64 [B] as input of the network, float32 [B,3,H,W] on its device."""
        if self._augment is None:
            return normalise(self._images.pixels(chosen).to(self._device), self._image)
        size = self._image.size
        draws = draw_views(len(chosen), size, size, 1, self._augment, self._generator)
        # A stream cuts resized crops while it decodes.
        pixels = self._images.pixels(chosen) if self._images.images is not None else self._images.pixels(chosen, draws)
        views = apply_views(pixels.to(self._device), draws.to(self._device), self._augment)
        return normalise(views[0], self._image)

    def features(self, model: ImageClassifier, views: int) -> Tensor:
        """Features float16 [N,V,D] of all images, of max(views, 1) views each."""
        batches, times = torch.arange(len(self.labels)).split(EVALUATION_BATCH), max(views, 1)
        with progress_bar(unit="images") as progress:
            bar = progress.add_task("features", total=times * len(self.labels), rate="")

            def one(chosen: Tensor) -> Tensor:
                features = _features(model, self.draw(chosen))
                progress.update(bar, advance=len(chosen))
                return features

            return torch.stack([torch.cat([one(chosen) for chosen in batches]) for _ in range(times)], 1)


@torch.no_grad()
def _features(model: ImageClassifier, inputs: Tensor) -> Tensor:
    """Features float16 [B,D] on the CPU. inputs: images or stored features."""
    return full_precision(model.backbone(inputs.to(next(model.parameters()).device).float())).half().cpu()


def shift_images(images: int) -> int:
    """Number of images that `shift_batch_norm` draws from `images` training images."""
    return SHIFT_BATCH * max(LEAST_SHIFT_STEPS, images // SHIFT_BATCH)


@torch.no_grad()
def shift_batch_norm(model: ImageClassifier, views: TrainingViews, seed: int) -> None:
    """Estimate mean and variance of each batch norm on one epoch of class-balanced batches (MiSLAS, CVPR 2021, section 3.3).

    The weights stay. MiSLAS moves the statistics while it trains the classifier; here they are the plain mean over the
    batches. Raises ParamsError for a network without batch norm.
    """
    norms = [module for module in model.backbone.modules() if isinstance(module, _BatchNorm)]
    if not norms:
        raise ParamsError(
            "classifier.shift_batch_norm is true, but the student's backbone has no batch norm; set it to false"
        )
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    sampler = ClassSampler(views.labels, model.classes)
    order = sampler.draw(shift_images(len(views.labels)), torch.Generator().manual_seed(seed))
    for chosen in order.split(SHIFT_BATCH):
        model.backbone(views.draw(chosen))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()

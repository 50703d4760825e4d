"""Check parity of an exported graph with the network in PyTorch, with separate bounds for float32 and float16."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from models.networks.cosine_classifier import ImageClassifier
from models.prior import adjust_logits
from pipeline.data.dataset import AnyImages, normalise
from pipeline.onnx_export.float16 import REMEDY, Float16Graph
from pipeline.params import ExportParams, ImageParams
from pipeline.shared.errors import StageError
from serving.shared.terminal import counted

if TYPE_CHECKING:
    import onnxruntime

COMPARED_IMAGES = 256  # held-out images whose best class is compared between float16 and PyTorch


@dataclass(frozen=True)
class Parity:
    """Parity of the float16 graph with PyTorch.

    logit: largest absolute difference of a logit. agreement: share of `images` whose best class is the same.
    """

    logit: float
    agreement: float
    images: int

    def __str__(self) -> str:
        return f"{self.agreement:.1%} of {counted(self.images, 'image')} keep their class"


@dataclass(frozen=True)
class Reference:
    """PyTorch's output for pixels uint8 [B,3,H,W] at strength [B,1]: logits [B,C], unit feature [B,D]."""

    pixels: np.ndarray
    strength: np.ndarray
    logits: np.ndarray
    feature: np.ndarray

    def run(self, session: onnxruntime.InferenceSession, *more: str) -> list[np.ndarray]:
        """Run a graph on the same input; returns logits, feature and the outputs named in `more`."""
        return session.run(["logits", "feature", *more], {"image": self.pixels, "strength": self.strength})

    def gaps(self, logits: np.ndarray, feature: np.ndarray) -> tuple[float, float]:
        """Largest absolute difference of a logit and of a feature value; NaN if one is NaN."""
        return float(np.abs(logits - self.logits).max()), float(np.abs(feature - self.feature).max())


@dataclass(frozen=True)
class TrainedNetwork:
    """PyTorch network with which a graph is compared. shift [C]: added to its logits, gives balanced logits."""

    model: ImageClassifier
    image: ImageParams
    log_prior: list[float]
    shift: list[float]

    def run(self, pixels: np.ndarray, strength: np.ndarray) -> Reference:
        """Run the network on pixels uint8 [B,3,H,W] at strength [B,1]."""
        with torch.inference_mode():
            features, logits = self.model(normalise(torch.from_numpy(pixels), self.image))
            balanced = logits + torch.tensor(self.shift, dtype=torch.float64).to(logits.dtype)
            adjusted = adjust_logits(balanced, torch.tensor(self.log_prior), torch.from_numpy(strength)).numpy()
            return Reference(pixels, strength, adjusted, torch.nn.functional.normalize(features, dim=1).numpy())


def check_parity(
    session: onnxruntime.InferenceSession, network: TrainedNetwork, examples: AnyImages, export: ExportParams, seed: int
) -> float:
    """Check the float32 graph in ONNX Runtime against PyTorch; returns the largest absolute logit difference.

    Batch sizes 1, 2, 7 and the maximum, half real images and half noise, one strength per row. Raises StageError if a
    logit or a feature value differs by more than export.tolerance, or is not finite.
    """
    largest = 0.0
    for reference in mixed_batches(network, examples, seed, export.max_batch_size):
        gaps = reference.gaps(*reference.run(session))
        if not max(gaps) <= export.tolerance:
            raise StageError(
                f"at batch size {len(reference.pixels)} ONNX Runtime differs from PyTorch by {gaps[0]:.2e} (logits) and "
                f"{gaps[1]:.2e} (feature), above export.tolerance = {export.tolerance:g}; nothing was exported"
            )
        largest = max(largest, gaps[0])
    return largest


def check_float16(
    half: Float16Graph,
    sessions: tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession],
    network: TrainedNetwork,
    examples: AnyImages,
    export: ExportParams,
    seed: int,
) -> Parity:
    """Check the float16 graph against PyTorch in float32. sessions: of half.served and half.rounding.

    Uses the batches of `check_parity`, and up to 256 real images whose best class is compared. Raises StageError if a
    value is outside float16's range, if a cosine (a logit divided by its scale; without a memory, times tau_s) or a
    feature value differs by more than export.half.tolerance, or if the share of images with the same best class is
    below export.half.agreement.
    """
    bounds, largest, same, images = export.half, 0.0, 0, 0
    served, rounding = sessions
    mixed = ((batch, False) for batch in mixed_batches(network, examples, seed, export.max_batch_size))
    real = ((batch, True) for batch in real_batches(network, examples, seed, export.max_batch_size))
    for reference, counted_images in itertools.chain(mixed, real):
        *rounded, magnitude = reference.run(rounding, "magnitude")
        half.check_magnitude(magnitude)
        same_class = np.ones(len(reference.pixels), dtype=bool)
        for logits, features in (reference.run(served), rounded):
            logit, feature = reference.gaps(logits, features)
            cosine = logit / network.model.logit_scale
            if not max(cosine, feature) <= bounds.tolerance:
                raise StageError(
                    f"at batch size {len(reference.pixels)} float16 differs from PyTorch by {cosine:.2e} "
                    f"(cosine) and {feature:.2e} (feature), above export.half.tolerance = {bounds.tolerance:g}; "
                    f"{REMEDY}, or raise the tolerance; nothing was exported"
                )
            largest = max(largest, logit)
            same_class &= logits.argmax(1) == reference.logits.argmax(1)
        if counted_images:
            same, images = same + int(same_class.sum()), images + len(same_class)
    if same < bounds.agreement * images:
        raise StageError(
            f"float16 gives {images - same} of {counted(images, 'image')} another best class than PyTorch, "
            f"{same / images:.4g} keep "
            f"theirs, below export.half.agreement = {bounds.agreement:g}; {REMEDY}; nothing was exported"
        )
    return Parity(largest, same / images, images)


def mixed_batches(network: TrainedNetwork, examples: AnyImages, seed: int, most: int) -> Iterator[Reference]:
    """PyTorch outputs for batches of 1, 2, 7 and `most` images, half real and half noise, one strength per row."""
    generator, size = np.random.default_rng(seed), network.image.size
    for batch in (1, 2, 7, most):
        pixels = generator.integers(0, 256, (batch, 3, size, size), dtype=np.uint8)
        chosen = generator.integers(0, len(examples), (batch + 1) // 2)
        real = examples.pixels(torch.from_numpy(chosen)).numpy()
        pixels[: len(real)] = real
        strength = generator.choice([0.0, 1.0, -0.5, 2.5], (batch, 1)).astype(np.float32)
        yield network.run(pixels, strength)


def real_batches(network: TrainedNetwork, examples: AnyImages, seed: int, most: int) -> Iterator[Reference]:
    """PyTorch outputs for up to 256 real images, each once, in batches of at most `most`, at strength 0."""
    chosen = np.random.default_rng(seed).permutation(len(examples))[:COMPARED_IMAGES]
    for start in range(0, len(chosen), most):
        pixels = examples.pixels(torch.from_numpy(chosen[start : start + most])).numpy()
        yield network.run(pixels, np.zeros((len(pixels), 1), dtype=np.float32))

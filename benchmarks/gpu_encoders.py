"""Step `encoders` of benchmarks.gpu: timm networks with random weights, which take as long as pretrained weights.

Images are in memory and not augmented. `embed` computes in float32; training on CUDA uses bfloat16 by default.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_runs import Figures
from models.networks.adapters import feature_backbone
from models.networks.backbones import Backbone, build_backbone
from models.networks.cosine_classifier import ImageClassifier
from models.networks.tuning import TunedBackbone, Tuning

TIMM = ("timm/vit_small_patch16_224", "timm/vit_base_patch16_224", "timm/convnext_tiny", "timm/efficientnet_lite0")
LORA = Tuning("lora", blocks=0, rank=8, rate=1.0, decay=1.0)
CLASSES = 200


def encoders(options: argparse.Namespace) -> Figures:
    """Measure images per second of embedding, and of a LoRA step (forward, backward, AdamW)."""
    size, rounds = (64, 2) if options.tiny else (224, 20)
    for name in ("timm/resnet10t",) if options.tiny else TIMM:
        network = build_backbone(name, size).to(options.device, memory_format=torch.channels_last)
        for what, batch, make in (
            ("embedding in float32", 256, partial(embedding, autocast=False)),
            ("embedding in bfloat16", 256, partial(embedding, autocast=True)),
            ("LoRA step in bfloat16", 64, lora_step),
        ):
            batch = 2 if options.tiny else batch
            images = torch.randn(batch, 3, size, size, device=options.device).to(memory_format=torch.channels_last)
            seconds = median_seconds(make(network, options.device), images, rounds)
            yield f"{name}, batch {batch}, {size} pixels: {what} images/s", batch / seconds, ""


def embedding(network: Backbone, device: str, autocast: bool) -> Callable[[Tensor], None]:
    """Return a function that computes the features of images [B,3,H,W]."""
    network.eval()

    @torch.inference_mode()
    def embed(images: Tensor) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            network(images)

    return embed


def lora_step(network: Backbone, device: str) -> Callable[[Tensor], None]:
    """Add LoRA updates to the network; return a function that takes an AdamW step with cross-entropy on images [B,3,H,W]."""
    tuned = TunedBackbone(network, feature_backbone(network.feature_dim, 0), LORA)
    model = ImageClassifier(tuned, CLASSES, 1 / 30).to(device).train()
    optimiser = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)

    def step(images: Tensor) -> None:
        with torch.autocast(device, torch.bfloat16):
            logits = model(images)[1]
            loss = F.cross_entropy(logits.float(), torch.arange(len(images), device=device) % CLASSES)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def median_seconds(work: Callable[[Tensor], None], images: Tensor, rounds: int) -> float:
    """Return the median seconds of a call, after two calls that are not counted."""
    marks = []
    for _ in range(rounds + 3):
        work(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
    return statistics.median(b - a for a, b in itertools.pairwise(marks[2:]))

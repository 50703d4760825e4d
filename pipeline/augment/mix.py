"""CutMix and Mixup of the classifier view: each image with a partner, and the share that it keeps of its own label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.params import AugmentParams


@dataclass(frozen=True)
class MixDraws:
    """partner int64 [B]: place in the global batch; share float32 [B]: lambda, what an image keeps; box int64 [B,4].

    box (top, left, bottom, right) is what CutMix takes from the partner, `None` for Mixup. The loss of a mixed image is
    share · CE(target) + (1 - share) · CE(target[partner]).
    """

    partner: Tensor
    share: Tensor
    box: Tensor | None

    def rows(self, start: int, stop: int) -> MixDraws:
        """The draws of images start..stop; their partners still count within the global batch."""
        box = None if self.box is None else self.box[start:stop]
        return MixDraws(self.partner[start:stop], self.share[start:stop], box)

    def to(self, device: torch.device | str) -> MixDraws:
        """The same on a device; to a GPU without waiting for it."""
        device = torch.device(device)

        def move(tensor: Tensor) -> Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" and not tensor.is_cuda else tensor
            return pinned.to(device, non_blocking=True)

        return MixDraws(move(self.partner), move(self.share), None if self.box is None else move(self.box))


def draw_mix(count: int, height: int, width: int, params: AugmentParams, generator: torch.Generator) -> MixDraws | None:
    """Partners by a permutation of the batch, lambda ~ Beta(mix_alpha, mix_alpha) an image; None where mix is none.

    CutMix (Yun et al. 2019): a box of the image's shape, area 1 - lambda, centre uniform, clipped at the borders; lambda is
    then what the box really leaves. Mixup: Zhang et al. 2018.
    """
    if params.mix == "none":
        return None
    partner = torch.randperm(count, generator=generator)
    # torch has no public Beta sampler that takes a generator; numpy's is seeded from it.
    seed = int(torch.randint(2**62, (), generator=generator))
    share = torch.from_numpy(np.random.default_rng(seed).beta(params.mix_alpha, params.mix_alpha, count))
    if params.mix == "mixup":
        return MixDraws(partner, share.float(), None)
    half = 0.5 * torch.sqrt(1 - share)
    edges = []
    for length in (height, width):
        centre = torch.randint(length, (count,), generator=generator)
        reach = (half * length).long()
        edges.append(((centre - reach).clamp(0, length), (centre + reach).clamp(0, length)))
    (top, bottom), (left, right) = edges
    kept = 1 - (bottom - top) * (right - left) / (height * width)
    return MixDraws(partner, kept.float(), torch.stack([top, left, bottom, right], 1))


def apply_mix(images: Tensor, draws: MixDraws, pool: Tensor | None = None) -> Tensor:
    """uint8 [b,3,H,W] mixed with their partners in `pool` uint8 [B,3,H,W], the global batch (default: images themselves)."""
    partners = (images if pool is None else pool)[draws.partner]
    if draws.box is None:
        share = draws.share[:, None, None, None]
        return (share * images + (1 - share) * partners).round().to(torch.uint8)
    top, left, bottom, right = (edge[:, None] for edge in draws.box.unbind(1))
    row = torch.arange(images.shape[2], device=images.device)
    column = torch.arange(images.shape[3], device=images.device)
    taken = ((row >= top) & (row < bottom))[:, :, None] & ((column >= left) & (column < right))[:, None, :]
    return torch.where(taken[:, None], partners, images)

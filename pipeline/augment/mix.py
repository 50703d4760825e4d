"""CutMix and Mixup of the classifier view: each image has a partner and keeps a share of its label."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.params import AugmentParams
from pipeline.shared.host_memory import copy_to_device


@dataclass(frozen=True)
class MixDraws:
    """Random numbers of CutMix or Mixup for a batch or this rank's share of it.

    partner int64 [B]: index in the global batch; share float32 [B]: lambda, the share of the image itself; box int64
    [B,4]: (top, left, bottom, right) of the region that CutMix copies from the partner, None for Mixup. The loss of a
    mixed image is share · CE(target) + (1 - share) · CE(target[partner]).
    """

    partner: Tensor
    share: Tensor
    box: Tensor | None

    def rows(self, start: int, stop: int) -> MixDraws:
        """The draws of images start..stop; partners remain indices in the global batch."""
        box = None if self.box is None else self.box[start:stop]
        return MixDraws(self.partner[start:stop], self.share[start:stop], box)

    def to(self, device: torch.device | str) -> MixDraws:
        """The draws on a device, by `copy_to_device`."""
        partner, share = copy_to_device(self.partner, device), copy_to_device(self.share, device)
        return MixDraws(partner, share, None if self.box is None else copy_to_device(self.box, device))


def draw_mix(count: int, height: int, width: int, params: AugmentParams, generator: torch.Generator) -> MixDraws | None:
    """Draw partners by a permutation of the batch, and lambda ~ Beta(mix_alpha, mix_alpha) per image; None if mix is none.

    CutMix (Yun et al. 2019): a box with the image's aspect ratio, area 1 - lambda and uniform centre, clipped at the
    borders; lambda is then recomputed from the clipped box. Mixup: Zhang et al. 2018.
    """
    if params.mix == "none":
        return None
    partner = torch.randperm(count, generator=generator)
    # torch has no public Beta sampler that takes a generator, so numpy's is used with a seed drawn from it.
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
    share = 1 - (bottom - top) * (right - left) / (height * width)
    return MixDraws(partner, share.float(), torch.stack([top, left, bottom, right], 1))


def apply_mix(images: Tensor, draws: MixDraws, pool: Tensor | None = None) -> Tensor:
    """Mix uint8 [b,3,H,W] with partners in `pool` uint8 [B,3,H,W], the global batch (default: the images themselves)."""
    partners = (images if pool is None else pool)[draws.partner]
    if draws.box is None:
        share = draws.share[:, None, None, None]
        return (share * images + (1 - share) * partners).round().to(torch.uint8)
    top, left, bottom, right = (edge[:, None] for edge in draws.box.unbind(1))
    row = torch.arange(images.shape[2], device=images.device)
    column = torch.arange(images.shape[3], device=images.device)
    taken = ((row >= top) & (row < bottom))[:, :, None] & ((column >= left) & (column < right))[:, None, :]
    return torch.where(taken[:, None], partners, images)

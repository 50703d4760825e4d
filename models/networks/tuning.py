"""Tune a pretrained encoder: select the trained weights, add low-rank updates or adapters, set learning rates by layer.

Frozen weights and statistics stay bit-identical. Frozen weights have no gradient. Frozen modules stay in eval mode, in
which batch norm uses its running statistics and does not update them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models.networks.adapters import with_encoder
from models.networks.backbones import Backbone

Tune = Literal["none", "last_blocks", "lora", "adaptformer", "all"]
ADAPTER_SCALE = 0.1  # the value in the code of AdaptFormer


class TuneError(ValueError):
    """An encoder cannot be tuned in the requested way; the message states why."""


@dataclass(frozen=True)
class Tuning:
    """How an encoder is tuned.

    tune: `last_blocks` trains the last `blocks` blocks, `lora` a low-rank update of every linear layer and convolution,
    `adaptformer` an adapter in each transformer block, `all` every weight. rank: rank of an update, or hidden units of an
    adapter. rate: learning rate of the last block as a multiple of the classifier's. decay: each earlier block has `decay`
    times the rate of the block after it.
    """

    tune: Tune
    blocks: int
    rank: int
    rate: float
    decay: float


class TunedBackbone(Backbone):
    """An encoder that is trained as `tuning` states, and the head after it (see feature_backbone).

    Raises TuneError when the encoder cannot be tuned in this way.
    """

    def __init__(self, encoder: Backbone, head: Backbone, tuning: Tuning) -> None:
        chained = with_encoder(encoder, head)
        super().__init__(chained.network, chained.feature_dim)
        self.tuning = tuning
        network = encoder.network
        network.requires_grad_(tuning.tune == "all")
        if tuning.tune == "last_blocks":
            first = _last_layer(network) - tuning.blocks
            if first < 0:
                raise TuneError(
                    f"its network has {first + tuning.blocks} blocks, not {tuning.blocks}; tune `all` of it"
                )
            layers = layers_of(network)
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(layers[name] > first)
        elif tuning.tune == "lora":
            add_low_rank_updates(network, tuning.rank)
        elif tuning.tune == "adaptformer":
            add_adapters(network, tuning.rank)
        if tuning.decay != 1:
            layers_of(network)  # raises TuneError before training

    def train(self, mode: bool = True) -> TunedBackbone:
        """Set training mode for the modules that have trained weights, and eval mode for all others."""
        super().train(mode)
        _keep_frozen(self)
        return self

    def rate_factors(self) -> dict[nn.Parameter, float]:
        """Return the learning rate of each trained encoder weight, as a multiple of the classifier's rate."""
        network, tuning = self.network.get_submodule("0.network"), self.tuning
        trained = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
        if tuning.decay == 1:
            return dict.fromkeys(trained.values(), tuning.rate)
        layers, last = layers_of(network), _last_layer(network)
        return {weight: tuning.rate * tuning.decay ** (last - layers[name]) for name, weight in trained.items()}


def _keep_frozen(module: nn.Module) -> None:
    if any(parameter.requires_grad for parameter in module.parameters()):
        for child in module.children():
            _keep_frozen(child)
    elif any(True for _ in itertools.chain(module.parameters(), module.buffers())):
        module.eval()


def layers_of(network: nn.Module) -> dict[str, int]:
    """Return the layer number of each weight of a timm network: 0 for the stem, then 1, 2, … for the blocks.

    Weights after the last block have its number. Raises TuneError for a network whose blocks timm does not describe.
    """
    from timm.models import group_parameters

    matcher: Any = getattr(network, "group_matcher", None)
    described = matcher(coarse=False) if matcher else None
    if not isinstance(described, dict):
        raise TuneError(f"timm does not describe the blocks of {type(network).__name__}")
    # Weights that match no pattern, such as the norm before a classifier, belong to the layer before them.
    rest = {"rest": [(r"", (99999,))]}
    layers: dict[str, int] = group_parameters(network, {**described, **rest}, reverse=True)
    return layers


def _last_layer(network: nn.Module) -> int:
    return max(layers_of(network).values())


class LowRankUpdate(nn.Module):
    """W + up · down, an update of a weight W [out,...] of rank `rank` (LoRA, Hu et al. 2022); up starts at 0.

    down: [rank,in]. up: [out,rank]. For a convolution, `in` is the number of input channels times the kernel area. The
    scale alpha / rank of the paper is 1.
    """

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        flat = weight.flatten(1)
        self.down = nn.Parameter(torch.empty(rank, flat.shape[1], dtype=weight.dtype, device=weight.device))
        self.up = nn.Parameter(torch.zeros(flat.shape[0], rank, dtype=weight.dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        """W [out,...] → W + up · down, of the same shape."""
        return weight + (self.up @ self.down).view_as(weight)


def add_low_rank_updates(network: nn.Module, rank: int) -> None:
    """Add an update to the weight of each linear layer and each convolution, except the first and grouped convolutions.

    Raises TuneError when the network has no such layer.
    """
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    chosen: list[nn.Linear | nn.Conv2d] = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    chosen += [layer for layer in convolutions[1:] if layer.groups == 1]
    if not chosen:
        raise TuneError("its network has no linear layer and no convolution that LoRA could update")
    for layer in chosen:
        parametrize.register_parametrization(layer, "weight", LowRankUpdate(layer.weight, rank))


class MlpAdapter(nn.Module):
    """scale · up(relu(down(x))), added to the output of a transformer block's MLP (AdaptFormer, Chen et al. 2022).

    x [...,width] is the MLP's input, which the block has normalised. up starts at 0.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        for weight in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """[...,width] → [...,width]."""
        change: Tensor = self.up(torch.relu(self.down(inputs)))
        return ADAPTER_SCALE * change


def add_adapters(network: nn.Module, hidden: int) -> None:
    """Add an adapter to the MLP of every transformer block.

    Raises TuneError when the network has no such block, or an MLP has no linear layer.
    """
    mlps: list[Any] = [block.mlp for block in network.modules() if hasattr(block, "attn") and hasattr(block, "mlp")]
    if not mlps:
        raise TuneError("its network has no transformer blocks with an MLP")
    for mlp in mlps:
        width = next((layer.in_features for layer in mlp.modules() if isinstance(layer, nn.Linear)), None)
        if width is None:
            raise TuneError(f"the MLP of its blocks, a {type(mlp).__name__}, has no linear layer")
        # A hook leaves the names of the pretrained weights unchanged.
        mlp.adapter = MlpAdapter(width, hidden)
        mlp.register_forward_hook(_with_adapter)


def _with_adapter(mlp: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    adapted: Tensor = output + mlp.adapter(inputs[0])
    return adapted


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state_dict with low-rank updates added to the weights, with the names of the plain network."""
    state = model.state_dict()
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight") and isinstance(
            module.parametrizations.weight[0], LowRankUpdate
        ):
            for name in module.parametrizations.weight.state_dict():
                del state[f"{path}.parametrizations.weight.{name}"]
            state[f"{path}.weight"] = module.weight.detach()
    return state

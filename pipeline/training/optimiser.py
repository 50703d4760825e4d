"""SGD or AdamW with all state allocated before the first step, as a captured step needs; learning rate by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.objectives.objective import Objective
from pipeline.params import LearningRateParams, TrainingParams

ADAM_SECOND_BETA = 0.999
# Adam's first step changes every weight by about the learning rate, even if its gradient is only rounding error. The check
# of a captured step therefore uses a learning rate below its tolerance.
ADAM_CAPTURE_RATE = 1e-4


class Optimiser:
    """SGD with momentum, or AdamW, over an objective's trained parameters; `objective.undecayed()` have no weight decay.

    factors: multiple of `set_rate`'s learning rate, by parameter; 1 for all other parameters.
    On CUDA, PyTorch's fused kernel is used with the learning rate in a tensor, which a captured step reads at every
    replay.
    """

    def __init__(
        self,
        objective: Objective,
        params: TrainingParams,
        factors: Mapping[nn.Parameter, float] | None = None,
    ) -> None:
        undecayed = [parameter for parameter in objective.undecayed() if parameter.requires_grad]
        apart = {id(parameter) for parameter in undecayed}
        decayed = [p for p in objective.parameters() if p.requires_grad and id(p) not in apart]
        device, by_factor = decayed[0].device, dict[tuple[float, bool], list[nn.Parameter]]()
        for parameter in [*decayed, *undecayed]:
            key = (factors or {}).get(parameter, 1.0), id(parameter) in apart
            by_factor.setdefault(key, []).append(parameter)
        rate, cuda = params.learning_rate, device.type == "cuda"
        groups: list[dict[str, Any]] = [
            {
                "params": members,
                "weight_decay": 0.0 if without_decay else params.weight_decay,
                "lr": torch.tensor(rate * factor, device=device) if cuda else rate * factor,
                "factor": factor,
            }
            for (factor, without_decay), members in by_factor.items()
        ]
        self._clip = params.gradient_clip
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self._optimiser: torch.optim.Optimizer
        if params.optimizer == "adamw":
            betas = params.momentum, ADAM_SECOND_BETA
            # Fused on the CPU too.
            self._optimiser = torch.optim.AdamW(groups, betas=betas, fused=True, capturable=cuda)
            buffers = ("exp_avg", "exp_avg_sq")
        else:
            self._optimiser = torch.optim.SGD(groups, momentum=params.momentum, fused=cuda)
            buffers = ("momentum_buffer",) if params.momentum else ()
        for parameter in self.parameters:
            # Zeros give the same first step as no buffer, and a captured step requires existing buffers.
            state = {name: torch.zeros_like(parameter) for name in buffers}
            if params.optimizer == "adamw":
                state["step"] = torch.zeros((), device=device)
            if state:
                self._optimiser.state[parameter] = state

    def set_rate(self, rate: float) -> None:
        """Set the learning rate for the next steps: `rate` times the factor of each parameter."""
        for group in self._optimiser.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * group["factor"])
            else:
                group["lr"] = rate * group["factor"]

    def zero_gradients(self) -> None:
        """Clear the gradients at the start of a step; later backward passes accumulate until `descend`."""
        self._optimiser.zero_grad(set_to_none=True)

    def descend(self) -> Tensor:
        """Update the parameters with their gradients; returns the norm of the gradient before clipping, a scalar tensor."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self._clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self._clip, norm)
        self._optimiser.step()
        return norm

    def state(self) -> list[Tensor]:
        """Return the momentum of SGD, or moments and step counter of AdamW, by parameter; empty for SGD without momentum."""
        state = self._optimiser.state
        return [tensor for p in self.parameters if p in state for tensor in state[p].values()]


def learning_rate(schedule: LearningRateParams, base: float, epoch: int, epochs: int) -> float:
    """Learning rate of a 0-based epoch out of `epochs`.

    Warm-up: base * (epoch+1) / warmup_epochs. `cosine`: base/2 * (1 + cos(pi * (e+1) / (E+1))), as in the official
    code. `steps`: multiplied by factor from the epoch of each milestone on, as in the paper.

    Rule `official` of `steps` (the authors' CIFAR program): warm-up and the interval before each milestone are one
    epoch longer, because that code compares with <=. So epoch `warmup_epochs` exceeds the base rate, with base * (w+1)
    / w, and the first lower rate is at epoch milestone + 1. Rule `official` of `cosine` (their ImageNet program): e and
    E are counted from the end of warm-up.
    """
    official, warmup = schedule.rule == "official", schedule.warmup_epochs
    late = official and schedule.kind == "steps"
    if warmup and epoch < warmup + late:
        return base * (epoch + 1) / warmup
    if schedule.kind == "cosine":
        first = warmup if official else 0
        return 0.5 * base * (1 + math.cos(math.pi * (epoch - first + 1) / (epochs - first + 1)))
    return base * schedule.factor ** sum(epoch >= milestone + late for milestone in schedule.milestones)


def step_rate(schedule: LearningRateParams, base: float, at: tuple[int, int], of: tuple[int, int]) -> float:
    """Learning rate of a 0-based epoch and step, `at`, out of the epochs and the steps of an epoch, `of`."""
    if schedule.kind == "poly":
        return polynomial_rate(base, at[0] * of[1] + at[1], of[0] * of[1], schedule.minimum, schedule.power)
    return learning_rate(schedule, base, at[0], of[0])


def polynomial_rate(base: float, step: int, steps: int, minimum: float = 1e-4, power: float = 0.9) -> float:
    """Learning rate of a 0-based step out of `steps`: (base - minimum) * (1 - step/steps)^power + minimum.

    Defaults of mmsegmentation's schedules; falls from `base` towards `minimum`.
    """
    return (base - minimum) * (1 - step / steps) ** power + minimum

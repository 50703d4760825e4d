"""SGD or AdamW with its state allocated from the start, so that all steps are alike, and the learning rate by epoch."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from models.objectives.student import StudentObjective
from models.objectives.teacher import TeacherObjective
from pipeline.params import LearningRateParams, TrainingParams

ADAM_SECOND_BETA = 0.999
# Adam's first step moves every weight by about the rate, also one whose gradient is nothing but rounding. The check of a
# captured step therefore runs at a rate below its tolerance.
ADAM_CAPTURE_RATE = 1e-4


class Optimiser:
    """SGD with momentum, or AdamW, over an objective's trained parameters; `objective.undecayed()` have no weight decay.

    On CUDA, PyTorch's fused kernel is used with the learning rate in a tensor, which a captured step reads at every
    replay.
    """

    def __init__(self, objective: TeacherObjective | StudentObjective, params: TrainingParams) -> None:
        undecayed = [parameter for parameter in objective.undecayed() if parameter.requires_grad]
        apart = {id(parameter) for parameter in undecayed}
        decayed = [p for p in objective.parameters() if p.requires_grad and id(p) not in apart]
        groups = [{"params": decayed, "weight_decay": params.weight_decay}]
        if undecayed:
            groups.append({"params": undecayed, "weight_decay": 0.0})
        device = decayed[0].device
        self._rate = torch.tensor(params.learning_rate, device=device) if device.type == "cuda" else None
        rate = params.learning_rate if self._rate is None else self._rate
        self._clip = params.gradient_clip
        self.parameters = [*decayed, *undecayed]
        self._optimiser: torch.optim.Optimizer
        if params.optimizer == "adamw":
            # Fused also on the CPU, where 60 tensors of 90,000 values take 23 ms, and 75 ms otherwise.
            betas, captured = (params.momentum, ADAM_SECOND_BETA), self._rate is not None
            self._optimiser = torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True, capturable=captured)
            buffers = ("exp_avg", "exp_avg_sq")
        else:
            self._optimiser = torch.optim.SGD(groups, lr=rate, momentum=params.momentum, fused=self._rate is not None)
            buffers = ("momentum_buffer",) if params.momentum else ()
        for parameter in self.parameters:
            # Zeros give the same first step as no buffer, and a captured step requires existing buffers.
            state = {name: torch.zeros_like(parameter) for name in buffers}
            if params.optimizer == "adamw":
                state["step"] = torch.zeros((), device=device)
            if state:
                self._optimiser.state[parameter] = state

    def set_rate(self, rate: float) -> None:
        """Set the learning rate of all parameters for the next steps."""
        if self._rate is not None:
            self._rate.fill_(rate)
            return
        for group in self._optimiser.param_groups:
            group["lr"] = rate

    def zero_gradients(self) -> None:
        """Clear the gradients at the start of a step; later backward passes accumulate until `descend`."""
        self._optimiser.zero_grad(set_to_none=True)

    def descend(self) -> Tensor:
        """Update the parameters by their gradients; returns the norm of the gradient before clipping, a scalar tensor."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self._clip:
            nn.utils.clip_grads_with_norm_(self.parameters, self._clip, norm)
        self._optimiser.step()
        return norm

    def state(self) -> list[Tensor]:
        """Momentum of SGD, or moments and step counter of AdamW, parameter by parameter; empty for SGD without momentum."""
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

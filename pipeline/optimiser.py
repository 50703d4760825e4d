"""SGD as the recipe has it, with its state in place from the start, so that every step is like the next."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.classification_objective import TeacherObjective
from models.student_objective import StudentObjective
from pipeline.params import TrainingParams


class Optimiser:
    """SGD with momentum over an objective's trained parameters; weight decay for all but `objective.undecayed()`.

    On CUDA it is PyTorch's fused kernel, with the learning rate in a tensor that a captured step reads anew.
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
        self._sgd = torch.optim.SGD(groups, lr=rate, momentum=params.momentum, fused=self._rate is not None)
        self.parameters = [*decayed, *undecayed]
        if params.momentum:
            # Zeros give the same first step as no buffer, and a captured step must find the buffers it writes to.
            for parameter in self.parameters:
                self._sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def set_rate(self, rate: float) -> None:
        """The learning rate of the steps to come, of all parameters."""
        if self._rate is not None:
            self._rate.fill_(rate)
            return
        for group in self._sgd.param_groups:
            group["lr"] = rate

    def forget_gradients(self) -> None:
        """Begin a step: gradients that are computed from here on add up to the one it descends."""
        self._sgd.zero_grad(set_to_none=True)

    def descend(self) -> Tensor:
        """One step down the gradient that the parameters hold; its norm, a scalar."""
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        self._sgd.step()
        return norm

    def momentum(self) -> list[Tensor]:
        """The momentum buffers, in the order of `parameters`; empty without momentum."""
        return [self._sgd.state[p]["momentum_buffer"] for p in self.parameters if p in self._sgd.state]

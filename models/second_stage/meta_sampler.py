"""Meta sampler of Balanced Meta-Softmax (Ren et al., NeurIPS 2020) on the features of a trained network.

The share of each class in a batch is learned: after a virtual step on a sampled batch, the classifier should have a small
cross-entropy on a class-balanced batch of training images.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.class_sampler import ClassSampler
from models.prior import adjust_logits
from models.second_stage.fitting import Head, TrainingFeatures

RATE = 0.01  # learning rate of the sampler, Adam
TEMPERATURE = 1.0  # of the Gumbel softmax


class MetaSampler:
    """Loss of a step of the classifier for `fitting.fit`, which trains the sampler too.

    An image of class c is drawn with a rate sigmoid(a_c), a from 0: at first each image is equally likely. Drawing an image by
    Gumbel-softmax over all images is drawing its class by Gumbel-softmax over log(n_c · rate_c) and then one of its images,
    which needs [B,C] and not [B,N] values. The batch of `fit` is the class-balanced one.
    """

    def __init__(self, head: Head, data: TrainingFeatures, log_prior: Tensor, rate: float, seed: int) -> None:
        """head: the classifier. log_prior: [C]. rate: learning rate of the virtual step. Tensors on the head's device."""
        self._head, self._data, self._log_prior, self._rate = head, data, log_prior, rate
        device = log_prior.device
        self._generator = torch.Generator().manual_seed(seed)
        self._sampler = ClassSampler(data.labels, data.classes)
        self._log_counts = torch.bincount(data.labels, minlength=data.classes).double().log().float().to(device)
        self.logit_rate = torch.zeros(data.classes, device=device, requires_grad=True)
        self._optimiser = torch.optim.Adam([self.logit_rate], lr=RATE)

    def __call__(self, features: Tensor, target: Tensor) -> Tensor:
        """Train the sampler on a class-balanced batch [B,D], [B]; the balanced softmax of a batch that it then draws."""
        drawn, labels, weight = self.draw(len(target))
        virtual = self._head.stepped((weight * self._losses(drawn, labels)).mean(), self._rate)
        self.logit_rate.grad = torch.autograd.grad(F.cross_entropy(virtual(features), target), self.logit_rate)[0]
        self._optimiser.step()
        with torch.no_grad():
            drawn, labels, _ = self.draw(len(target))
        return self._losses(drawn, labels).mean()

    def draw(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Features [B,D] and labels [B] of a sampled batch, and the weights 1 that carry the gradient of the sampler."""
        scores = self._log_counts + F.logsigmoid(self.logit_rate)
        uniform = torch.rand(number, len(scores), generator=self._generator).clamp_min(1e-20).to(scores.device)
        soft = ((scores - (-uniform.log()).log()) / TEMPERATURE).softmax(1)
        classes = soft.argmax(1)
        rows = self._sampler.draw_from(classes.cpu(), self._generator)
        own = soft.gather(1, classes[:, None])[:, 0]
        weight = 1 + (own - own.detach())
        return self._data.batch(rows, scores.device, self._generator), classes, weight

    def _losses(self, features: Tensor, target: Tensor) -> Tensor:
        logits = adjust_logits(self._head(features), self._log_prior, 1.0)
        return F.cross_entropy(logits, target, reduction="none")

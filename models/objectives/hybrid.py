"""Objective of Hybrid-SC (Wang et al. 2021): SupCon first, then more and more cross-entropy of a class-balanced batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.contrast.supcon import SupCon
from models.contrast.terms import ContrastInputs
from models.losses.class_loss import ClassLoss, Mixed
from models.networks.cosine_classifier import ImageClassifier
from models.objectives.objective import Objective


class HybridObjective(Objective):
    """share * beta * SupCon of two views + (1 - share) * gamma * L_cls of a second batch, share = 1 - (epoch / epochs)².

    The second batch is drawn with all classes equally likely. All 3B images go through the network in one pass, so that its
    batch norm uses all of them. The authors published no code; the sampling of the second batch is not verified.
    """

    views = 2
    companion = 0.0
    share: Tensor

    def __init__(self, model: ImageClassifier, term: SupCon, loss: ClassLoss, gamma: float, beta: float) -> None:
        """loss: L_cls without logit adjustment, because its batch is balanced."""
        super().__init__()
        self.model, self.term, self.loss, self.gamma, self.beta = model, term, loss, gamma, beta
        self.register_buffer("share", torch.ones(()))

    def batch_modules(self) -> list[nn.Module]:
        """See Objective."""
        return [self.model, *self.term.batch_modules()]

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters without weight decay: those of L_cls."""
        return self.loss.undecayed(self.model.classifier) if self.model.cosine else []

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set the share of the contrast term, and the class weights of L_cls."""
        self.share.fill_(1 - (epoch / epochs) ** 2)
        self.loss.begin_epoch(epoch, epochs)

    def forward(
        self,
        views: Tensor,
        target: Tensor,
        sample_ids: Tensor,
        mixed: Mixed | None = None,
        whole: None = None,  # noqa: ARG002 - the interface of Objective
    ) -> dict[str, Tensor]:
        """views [2,2B,3,H,W], target, sample_ids [2B] → {loss, classification, contrast, share}.

        The rows of both batches alternate. Of the second batch, the first view is used. Raises ValueError for mixed labels.
        """
        if mixed is not None:
            raise ValueError("the contrast of Hybrid-SC needs one label per image; the batch has mixed images")
        images = len(target) // 2
        features, logits = self.model(torch.cat([*views[:, ::2], views[0, 1::2]]))
        queries = features[: 2 * images].unflatten(0, (2, images))
        contrast = self.term(ContrastInputs(queries, target[::2], sample_ids[::2]))["loss"]
        classification = self.loss(logits[2 * images :], target[1::2])
        loss = self.share * self.beta * contrast + (1 - self.share) * self.gamma * classification
        parts = {"loss": loss, "classification": classification.detach(), "contrast": contrast.detach()}
        return {**parts, "share": self.share.clone()}

"""Teacher objective: L_cls of one view, plain or mixed. The student uses the same L_cls as its first term."""

from __future__ import annotations

from torch import Tensor, nn

from models.losses.class_loss import ClassLoss, Mixed
from models.networks.cosine_classifier import ImageClassifier
from models.objectives.objective import Objective


class TeacherObjective(Objective):
    """L_cls on one view: Eq. 6, plain cross-entropy if `adjustment` (strength of the logit adjustment) is 0, or another loss.

    loss: replaces the cross-entropy with this adjustment.
    """

    def __init__(
        self, model: ImageClassifier, log_prior: Tensor, adjustment: float = 1.0, loss: ClassLoss | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = ClassLoss(log_prior, adjustment) if loss is None else loss

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Set the class weights of the epoch."""
        self.loss.begin_epoch(epoch, epochs)

    def forward(
        self,
        views: Tensor,
        target: Tensor,
        sample_ids: Tensor,  # noqa: ARG002 - the interface of Objective
        mixed: Mixed | None = None,
        whole: None = None,  # noqa: ARG002 - the interface of Objective
    ) -> dict[str, Tensor]:
        """views [1,B,3,H,W], target [B], sample_ids [B] → {loss, classification}, scalar tensors."""
        _, logits = self.model(views[0])
        loss = self.loss(logits, target, mixed)
        return {"loss": loss, "classification": loss.detach()}

    def undecayed(self) -> list[nn.Parameter]:
        """Parameters without weight decay: none, unless the loss names some of the classifier."""
        return self.loss.undecayed(self.model.classifier)

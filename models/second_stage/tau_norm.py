"""tau-normalisation of a linear classifier (Kang et al., ICLR 2020, Eq. 3 and 4)."""

from __future__ import annotations

from torch import Tensor

TAUS = tuple(round(0.1 * step, 1) for step in range(21))  # the grid of the authors' code


def tau_normalised(weight: Tensor, tau: float) -> Tensor:
    """W_c / |W_c|^tau for each row of weight [C,D]; tau 0 changes nothing, 1 gives rows of length 1.

    The classifier is used without its bias. The rows of a cosine classifier have one length: for it, tau only scales the
    logits.
    """
    normalised: Tensor = weight / weight.norm(dim=1, keepdim=True) ** tau
    return normalised

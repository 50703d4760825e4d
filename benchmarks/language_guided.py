"""Second stage of VL-LTR on stored features: language-guided recognition (arXiv 2111.13579, Sec. 3.3), as a baseline.

For an image feature x and the M sentences t_cm of class c, with matrices W_q and W_k that start as the identity:

    a_cm = softmax over m of W_q x · W_k t_cm / √D;   v_c = Σ_m a_cm t_cm
    ℓ1 = MLP(x), D → 4 D → C;   ℓ2_c = cos(x, v_c) / 0.07;   loss = CE(ℓ1) + CE(ℓ2)
    p = share · softmax(ℓ1) + (1 − share) · softmax(ℓ2)

A class is drawn with a probability in proportion to √n_c. Where image and text features have no common space, as those of two
separate encoders, W_q x stands for x in ℓ2 too, and W_q starts at random and learns at the rate of the MLP. The served graph
would hold all sentences, so Tailor has this method only here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.class_sampler import ClassSampler

TEMPERATURE, SHARE = 0.07, 0.2  # SHARE: as on ImageNet-LT; 0.7 on iNaturalist
EPOCHS, BATCH, RATE, ATTENTION_RATE, WEIGHT_DECAY = 50, 256, 1e-3, 1e-6, 0.05


class LanguageGuided(nn.Module):
    """Image features [B,D] → logits of the MLP and of the sentences, both [B,C].

    sentences: unit features [N,E] sorted by class; row_class: int64 [N], each of the C classes has a row.
    """

    sentences: Tensor
    present: Tensor
    products: Tensor

    def __init__(self, width: int, sentences: Tensor, row_class: Tensor) -> None:
        super().__init__()
        rows = [sentences[row_class == label] for label in range(int(row_class.max()) + 1)]
        self.register_buffer("sentences", nn.utils.rnn.pad_sequence(rows, batch_first=True))
        self.register_buffer("present", torch.arange(self.sentences.shape[1]) < torch.tensor([[len(r)] for r in rows]))
        self.register_buffer("products", self.sentences @ self.sentences.mT)
        self.common_space = width == sentences.shape[1]
        self.query = nn.Linear(width, sentences.shape[1], bias=False)
        self.key = nn.Linear(sentences.shape[1], sentences.shape[1], bias=False)
        nn.init.eye_(self.key.weight)
        if self.common_space:
            nn.init.eye_(self.query.weight)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, len(rows)))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the MLP, and of the cosine to the text vector of each class."""
        query = self.query(features)
        scores = torch.einsum("be,cme->bcm", query, self.key(self.sentences)) / query.shape[1] ** 0.5
        attention = scores.masked_fill(~self.present, -torch.inf).softmax(dim=2)
        # x · v_c and |v_c|² from the products of the sentences, so that no tensor v_c of [B,C,E] is needed.
        image = F.normalize(features if self.common_space else query, dim=1)
        products = (attention * torch.einsum("be,cme->bcm", image, self.sentences)).sum(2)
        squares = (attention * torch.einsum("bcm,cmn->bcn", attention, self.products)).sum(2)
        return self.mlp(features), products * squares.clamp_min(1e-16).rsqrt() / TEMPERATURE

    def log_probabilities(self, features: Tensor) -> Tensor:
        """Log of the mixture p, [B,C]."""
        network, text = (logits.log_softmax(dim=1) for logits in self(features))
        share = torch.tensor(SHARE)
        return torch.logaddexp(share.log() + network, (1 - share).log() + text)


def train_language_guided(
    features: Tensor, labels: Tensor, sentences: Tensor, row_class: Tensor, seed: int
) -> LanguageGuided:
    """Train on features [N,D] with labels int64 [N]; AdamW, cosine to 0, the same number of images in each epoch."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LanguageGuided(features.shape[1], sentences, row_class)
    attention = [model.key.weight, *([model.query.weight] if model.common_space else [])]
    fast = [*model.mlp.parameters(), *([] if model.common_space else [model.query.weight])]
    groups = [{"params": attention, "lr": ATTENTION_RATE}, {"params": fast, "lr": RATE}]
    optimiser = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY, fused=True)
    steps = EPOCHS * max(1, len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    sampler = ClassSampler(labels, len(model.present), power=0.5)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = sampler.draw(min(BATCH, len(labels)), generator)
        loss = torch.stack([F.cross_entropy(logits, labels[index]) for logits in model(features[index].float())]).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return model.eval()

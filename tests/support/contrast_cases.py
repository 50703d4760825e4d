"""The hand-computed case of the contrast terms: two images, two views, three classes, temperature 0.5; and helpers."""

import torch
from torch import nn

from models.contrast.terms import ContrastInputs

EXACT = {"rel": 0, "abs": 1e-10}
COUNTS = [5, 3, 2]
PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
LOG_PRIOR = PRIOR.log()
LOGITS = torch.tensor([[2, 0.5, -1], [1, 0, 0.5]], dtype=torch.float64)
TARGET = torch.tensor([0, 2])
IDS = torch.tensor([0, 1])
U = torch.tensor([[0.8, 0.6], [0, -1]], dtype=torch.float64)
V = torch.tensor([[1, 0], [-0.8, 0.6]], dtype=torch.float64)
VIEWS = torch.stack([U, V])
CENTRES = torch.tensor([[0.6, 0.8], [0, 1], [-0.6, -0.8]], dtype=torch.float64)
QUEUE = torch.tensor([[0, 1], [0.6, 0.8]], dtype=torch.float64)
QUEUE_CLASS = torch.tensor([1, 0])
TAU = 0.5


def inputs(queries=VIEWS, target=TARGET, ids=IDS, **optional):
    """Return the case's inputs of a term."""
    return ContrastInputs(queries, target, ids, **optional)


def unchanged():
    """Return a head that returns its input."""
    return nn.Identity()


def filled(queue, features=QUEUE, labels=QUEUE_CLASS):
    """Return the queue in float64 with the given rows."""
    queue.features, queue.labels = features.clone(), labels.clone()
    return queue


def unit(*shape, seed=0):
    """Return random unit vectors in float64."""
    values = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(values, dim=-1)

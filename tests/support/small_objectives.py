"""Small objectives for tests: three classes, a batch of six 8x8 images, sixteen rows of queues."""

import torch

from models.networks.cosine_classifier import ImageClassifier
from models.objectives.student import StudentObjective
from models.objectives.student_weights import StudentWeights

CLASSES, COUNTS, BATCH = 3, [50, 12, 3], 6
LOG_PRIOR = torch.tensor([50 / 65, 12 / 65, 3 / 65]).log()
TARGET = torch.tensor([0, 0, 1, 2, 0, 1])
IDS = torch.arange(100, 106)


def network(backbone="resnet20", seed=0):
    """Return a newly initialised classifier of three classes."""
    torch.manual_seed(seed)
    return ImageClassifier(backbone, CLASSES, 0.1)


def student(*, model=None, teacher=None, weights=None, train_tau_g=True, total=16, minimum=2, counts=COUNTS, **encoder):
    """Return a student's objective in training mode with unequal weights of the terms. encoder: of the contrast."""
    teacher = teacher or network(seed=1)
    model = model or network()
    chosen = {
        "gamma": 0.7, "beta": 1.5, "alpha": 2.0, "distillation_temperature": 4.0, "prior_strength": 0.5, **(weights or {}),
    }  # fmt: skip
    torch.manual_seed(2)
    return StudentObjective(
        model, teacher, LOG_PRIOR, counts, StudentWeights(**chosen),
        tau_g=0.2, train_tau_g=train_tau_g, queue_total=total, queue_minimum=minimum, projection_dim=8,
        generator=torch.Generator().manual_seed(3), **encoder,
    ).train()  # fmt: skip


def views(number=3, batch=BATCH):
    """Return random views [number,batch,3,8,8], the same at every call."""
    return torch.randn(number, batch, 3, 8, 8, generator=torch.Generator().manual_seed(4))


def images_seen_by(module):
    """Return a list that collects the inputs of a module."""
    seen = []
    module.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    return seen


def descend(objective, rate=0.1):
    """Run one gradient step, and the hooks that the engine calls after it."""
    objective.zero_grad()
    objective(views(objective.views), TARGET, IDS)["loss"].backward()
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter -= rate * parameter.grad
    objective.after_step()


def gradient(module):
    """Return the sum of the absolute gradients of a module's parameters."""
    return sum(p.grad.abs().sum().item() for p in module.parameters() if p.grad is not None)

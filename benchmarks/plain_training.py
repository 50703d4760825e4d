"""Baseline of benchmarks.training: GML training written in the usual way, without Tailor's training engine.

Data: PIL images, torchvision transforms applied image by image, three views, DataLoader workers. Network: a standard
CIFAR ResNet, contiguous, float32, eager. Loss: the one-hot form of benchmarks.gml_forms. Step: SGD, then `.item()` of
loss and accuracy. The mathematics is that of the engine: `loss_parts` on the same views gives the same numbers, which
benchmarks.training checks first. Shared with the engine: cosine classifier, projection heads, class-wise queues.
"""

from __future__ import annotations

import copy
import itertools
import random
import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.gml_forms import Case, one_hot
from models.contrast.gml import ClassSegments
from models.networks.cosine_classifier import ImageClassifier
from models.objectives.student import StudentObjective
from models.objectives.teacher import TeacherObjective
from pipeline.data.dataset import Images
from pipeline.params import ImageParams, TrainingParams


class Cutout:
    """Transform: a black square of `side` pixels at a uniform random position of a tensor [3,H,W], clipped."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        top, left = random.randrange(height) - self.side // 2, random.randrange(width) - self.side // 2
        image[:, max(top, 0) : max(top + self.side, 0), max(left, 0) : max(left + self.side, 0)] = 0
        return image


def training_transform(params: TrainingParams, image: ImageParams) -> transforms.Compose:
    """Return the CIFAR recipe's augmentation: crop, flip, AutoAugment, Cutout."""
    augment = params.augment
    return transforms.Compose(
        [
            transforms.RandomCrop(image.size, padding=augment.crop_padding),
            transforms.RandomHorizontalFlip(),
            transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10),
            transforms.ToTensor(),
            Cutout(augment.cutout),
            transforms.Normalize(image.mean, image.std),
        ]
    )


class Views(Dataset):
    """Dataset: item i is (`views` independent augmentations float32 [3,H,W], label, i)."""

    def __init__(self, data: Images, transform: transforms.Compose, views: int) -> None:
        self.pixels = data.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = data.labels.tolist()
        self.transform, self.views = transform, views

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int, int]:
        image = Image.fromarray(self.pixels[index])
        return [self.transform(image) for _ in range(self.views)], self.labels[index], index


def training_loader(
    data: Images, params: TrainingParams, image: ImageParams, views: int, workers: int, pinned: bool
) -> DataLoader:
    """Return a DataLoader of shuffled full batches with `views` views per image."""
    return DataLoader(
        Views(data, training_transform(params, image), views),
        batch_size=params.batch_size, shuffle=True, drop_last=True,
        num_workers=workers, pin_memory=pinned, persistent_workers=workers > 0,
    )  # fmt: skip


def test_loader(data: Images, image: ImageParams, workers: int, pinned: bool) -> DataLoader:
    """Return a DataLoader of normalised images in order."""
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(image.mean, image.std)])
    views, keep = Views(data, transform, 1), workers > 0
    return DataLoader(views, 128, num_workers=workers, pin_memory=pinned, persistent_workers=keep)


class PlainBlock(nn.Module):
    """Residual block: two convolutions with batch norm, shortcut of option A."""

    def __init__(self, inside: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.stride, self.extra = stride, planes - inside

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return F.relu(out + x)


class PlainClassifier(nn.Module):
    """CIFAR ResNet with cosine classifier and the weights of an ImageClassifier. images → (features, logits)."""

    def __init__(self, model: ImageClassifier) -> None:
        super().__init__()
        state = model.backbone.network.state_dict()
        blocks = 1 + max(int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name)))
        widths = [16, *(width for width in (16, 32, 64) for _ in range(blocks // 3))]
        self.network = nn.Module()
        self.network.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.network.bn1 = nn.BatchNorm2d(16)
        self.network.blocks = nn.Sequential(
            *(PlainBlock(a, b, 1 if a == b else 2) for a, b in itertools.pairwise(widths))
        )
        self.network.to(model.classifier.weight.dtype).load_state_dict(state)
        self.classifier = copy.deepcopy(model.classifier)
        self.tau_s = model.tau_s

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        network = self.network
        features = F.relu(network.bn1(network.conv1(images)))
        features = F.adaptive_avg_pool2d(network.blocks(features), 1).flatten(1)
        return features, self.classifier(features) / self.tau_s


class PlainTeacher(nn.Module):
    """L_cls on one view, initialised with the state of an engine's objective."""

    def __init__(self, objective: TeacherObjective) -> None:
        super().__init__()
        self.model = PlainClassifier(objective.model)
        self.register_buffer("log_prior", objective.loss.log_prior.clone())

    def loss_parts(self, views: list[Tensor], target: Tensor, _indexes: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the loss by name, and the logits for the accuracy."""
        _, logits = self.model(views[0])
        return {"loss": F.cross_entropy(logits + self.log_prior, target)}, logits


class PlainStudent(nn.Module):
    """The three loss terms on three views, initialised with the state of an engine's objective."""

    def __init__(self, objective: StudentObjective) -> None:
        super().__init__()
        self.model, self.teacher = PlainClassifier(objective.model), PlainClassifier(objective.teacher)
        self.teacher.requires_grad_(False).eval()
        self.query_head, self.key_head = copy.deepcopy(objective.query_head), copy.deepcopy(objective.key_head)
        self.queues = copy.deepcopy(objective.queues)
        self.log_tau_g = nn.Parameter(objective.log_tau_g.detach().clone())
        self.register_buffer("log_prior", objective.log_prior.clone())
        self.weights = objective.weights

    def train(self, mode: bool = True) -> PlainStudent:
        super().train(mode)
        self.teacher.eval()
        return self

    def loss_parts(self, views: list[Tensor], target: Tensor, indexes: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the losses by name (`loss`: their weighted sum), and the logits for the accuracy."""
        batch, weights = len(target), self.weights
        features, logits = self.model(torch.cat(views[:2]))
        with torch.no_grad():
            teacher_features, teacher_logits = self.teacher(torch.cat([views[0], views[2]]))
            self.queues.enqueue(teacher_features[batch:], target, indexes)
        logits, teacher_logits = logits[:batch], teacher_logits[:batch]
        similarity = self.query_head(features[batch:]) @ self.key_head(self.queues.features).T
        runs = ClassSegments(self.queues.row_class, self.queues.starts, self.queues.lengths, 0)
        case = Case(similarity, self.log_tau_g, runs, target, self.log_prior, indexes, self.queues.sample_ids)
        gml, tau = one_hot(case)
        heat = weights.distillation_temperature
        log_student, teacher = F.log_softmax(logits / heat, 1), F.softmax(teacher_logits / heat, 1)
        parts = {
            "classification": F.cross_entropy(logits + self.log_prior, target),
            "gml": gml,
            "tau": tau,
            "distillation": F.kl_div(log_student, teacher, reduction="batchmean") * heat**2,
        }
        contrast = weights.beta * (gml + tau)
        loss = weights.gamma * parts["classification"] + contrast + weights.alpha * parts["distillation"]
        return {"loss": loss, **parts}, logits


def plain_optimiser(module: nn.Module, params: TrainingParams) -> torch.optim.SGD:
    """Return SGD with weight decay for all parameters but log tau_g."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if name != "log_tau_g"], "weight_decay": params.weight_decay},
        {"params": [p for name, p in named if name == "log_tau_g"], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.SGD(groups, lr=params.learning_rate, momentum=params.momentum)


def train_epoch(
    module: PlainTeacher | PlainStudent,
    batches: Iterator[tuple[list[Tensor], Tensor, Tensor]] | DataLoader,
    optimiser: torch.optim.SGD,
    device: torch.device,
) -> float:
    """Train one epoch; return the mean loss. Loss and accuracy are read after every step, as is usual."""
    module.train()
    losses, right, seen = 0.0, 0, 0
    for views, target, indexes in batches:
        views = [view.to(device, non_blocking=True) for view in views]
        target, indexes = target.to(device, non_blocking=True), indexes.to(device, non_blocking=True)
        parts, logits = module.loss_parts(views, target, indexes)
        optimiser.zero_grad()
        parts["loss"].backward()
        optimiser.step()
        losses += parts["loss"].item() * len(target)
        right += (logits.argmax(1) == target).sum().item()
        seen += len(target)
    return losses / seen


@torch.no_grad()
def test_accuracy(module: PlainTeacher | PlainStudent, loader: DataLoader, device: torch.device) -> float:
    """Return the share of images whose largest logit is that of their class."""
    module.eval()
    right = sum(
        (module.model(views[0].to(device))[1].argmax(1) == target.to(device)).sum().item()
        for views, target, _ in loader
    )
    return right / len(loader.dataset)

"""Features around one centre per class, as those of an encoder, for tests of labels."""

import torch

from pipeline.labels.features import LabelledImages


def clusters(counts, seed=0, width=24, noise=0.25):
    """Return features around one centre per class, and labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.nn.functional.normalize(torch.randn(len(counts), width, generator=generator), dim=1)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return centres[labels] + noise * torch.randn(len(labels), width, generator=generator), labels, generator


def labelled(features, labels, origin=None):
    count = len(labels)
    names = [f"class {label}" for label in range(int(labels.max()) + 1)]
    origin = torch.arange(count) if origin is None else origin
    ids = [f"image {index}" for index in range(count)]
    return LabelledImages(features, labels, origin, ["train"] * count, ids, ids, names)

"""Prepare the requests of a load test: images of a folder under the balanced prior and under the tested prior."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from serving.client.images import image_files, read_image
from serving.client.sync_client import Client
from serving.transport.messages import Infer

MAX_REQUESTS = 256
MAX_BYTES = 256 * 1024 * 1024
SEED = 0
BALANCED, ADJUSTED = "balanced", "adjusted"


@dataclass(frozen=True)
class Mix:
    """Prepared requests by label, and the share of adjusted ones. They are encoded once, before the test."""

    requests: dict[str, list[Infer]]
    adjusted_share: float

    def draw(self) -> tuple[str, Infer]:
        """Draw a random request; return its label and the request."""
        label = ADJUSTED if random.random() < self.adjusted_share else BALANCED
        return label, random.choice(self.requests[label])


def make_mix(client: Client, folder: Path, prior: str, adjusted_share: float, batch: int) -> Mix:
    """Prepare requests of `batch` images from a folder: at most MAX_REQUESTS, with at most MAX_BYTES in total.

    A larger folder is sampled with a fixed seed. Every used image is decoded once. Raises InputError for a folder
    without images and for an invalid image or prior, ServingError when the server does not return its classes.
    """
    files = image_files(folder)
    random.Random(SEED).shuffle(files)
    groups: list[list[bytes]] = []
    size = 0
    for start in range(0, min(len(files), MAX_REQUESTS * batch), batch):
        # The last group wraps around to the first files, so that all requests have the same batch size.
        group = [read_image(files[(start + offset) % len(files)]) for offset in range(batch)]
        size += sum(map(len, group))
        if groups and size > MAX_BYTES:
            break
        groups.append(group)
    requests = {}
    for label, requested, share in ((BALANCED, "balanced", 1 - adjusted_share), (ADJUSTED, prior, adjusted_share)):
        requests[label] = [client.request(group, requested) for group in groups] if share > 0 else []
    return Mix(requests, adjusted_share)

"""The requests of a load test: images of a folder, each under the balanced prior and under the one that is tested."""

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
    """Prepared requests by label, and the share of adjusted ones. The bytes are made once, before the test."""

    requests: dict[str, list[Infer]]
    adjusted_share: float

    def draw(self) -> tuple[str, Infer]:
        """A label and a request, at random."""
        label = ADJUSTED if random.random() < self.adjusted_share else BALANCED
        return label, random.choice(self.requests[label])


def make_mix(client: Client, folder: Path, prior: str, adjusted_share: float, batch: int) -> Mix:
    """Requests of `batch` images each from the folder, at most MAX_REQUESTS of them and MAX_BYTES in all.

    A larger folder is sampled, the same way each time. Every image is decoded once here. Raises InputError for a folder
    without images and for an unusable image or prior, ServingError when the server does not return its classes.
    """
    files = image_files(folder)
    random.Random(SEED).shuffle(files)
    groups: list[list[bytes]] = []
    size = 0
    for start in range(0, min(len(files), MAX_REQUESTS * batch), batch):
        # The last group is filled up from the beginning, so that all requests have the same size.
        group = [read_image(files[(start + offset) % len(files)]) for offset in range(batch)]
        size += sum(map(len, group))
        if groups and size > MAX_BYTES:
            break
        groups.append(group)
    requests = {}
    for label, requested, share in ((BALANCED, "balanced", 1 - adjusted_share), (ADJUSTED, prior, adjusted_share)):
        requests[label] = [client.request(group, requested) for group in groups] if share > 0 else []
    return Mix(requests, adjusted_share)

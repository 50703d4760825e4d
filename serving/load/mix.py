"""The requests of a load test: images of a folder, each under the balanced prior and under the one that is tried."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from serving.calls import Infer
from serving.client import Client
from serving.images import image_files, read_image

MAX_REQUESTS = 256
MAX_BYTES = 256 * 1024 * 1024
SEED = 0
BALANCED, ADJUSTED = "balanced", "adjusted"


@dataclass(frozen=True)
class Mix:
    """Prepared requests by label, and the share of those that are adjusted. Bytes are made once, before the test."""

    requests: dict[str, list[Infer]]
    adjusted_share: float

    def draw(self) -> tuple[str, Infer]:
        """A label and a request, at random."""
        label = ADJUSTED if random.random() < self.adjusted_share else BALANCED
        return label, random.choice(self.requests[label])


def make_mix(client: Client, folder: Path, prior: str, adjusted_share: float, batch: int) -> Mix:
    """Requests of `batch` images each from the folder, at most MAX_REQUESTS of them and MAX_BYTES in all.

    From a larger folder a sample is taken, the same each time. Every image is decoded once here. Raises InputError for
    a folder without images, an image or a prior that is not usable, ServingError when the server cannot say its classes.
    """
    files = image_files(folder)
    random.Random(SEED).shuffle(files)
    groups: list[list[bytes]] = []
    size = 0
    for start in range(0, min(len(files), MAX_REQUESTS * batch), batch):
        # The last group is filled up from the beginning, so that all requests are alike.
        group = [read_image(files[(start + place) % len(files)]) for place in range(batch)]
        size += sum(map(len, group))
        if groups and size > MAX_BYTES:
            break
        groups.append(group)
    requests = {}
    for label, asked in ((BALANCED, "balanced"), (ADJUSTED, prior)):
        wanted = adjusted_share < 1 if label == BALANCED else adjusted_share > 0
        requests[label] = [client.request(group, asked) for group in groups] if wanted else []
    return Mix(requests, adjusted_share)

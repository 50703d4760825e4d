"""Send golden requests to a running server: both models of a release must return the responses stored in its export."""

from __future__ import annotations

from contextlib import closing

import numpy as np

from serving.client.sync_client import Client
from serving.repository.manifest import served_probabilities
from serving.repository.release import Release
from serving.shared.errors import ServingError
from serving.shared.names import STUDENT
from serving.shared.priority import throttled
from serving.transport.sync_transport import Transport


class WrongResponseError(ServingError):
    """A server answered a golden request with other classes or probabilities than the export stored."""


def check_golden(client: Client, release: Release, pause: bool = True) -> None:
    """Send the golden requests of a release to `classifier`. Raises ServingError if one fails or is answered wrongly.

    pause: wait after each request, so that user requests get most of the server's time.
    """
    for golden in throttled(release.golden) if pause else release.golden:
        answer = client.predict([golden.image_bytes()], golden.strength, version=release.version)[0]
        difference = golden.difference(answer.indexes, answer.probabilities)
        if difference:
            raise WrongResponseError(f"classifier {release.version} answers a golden request wrongly: {difference}")


def check_student(url: str, release: Release, timeout: float, pause: bool = True) -> None:
    """Send the golden requests of a release to `student`, which the classifier of a small network does not use.

    pause: as in check_golden. Raises ServingError if one fails or is answered wrongly.
    """
    manifest = release.manifest
    form = manifest.image
    with closing(Transport(url, timeout)) as transport:
        for golden in throttled(release.golden) if pause else release.golden:
            image = form.pixels(golden.image_bytes())[None]
            logits = _logits(transport, release.version, image, golden.strength)[0]
            probability = served_probabilities(logits, golden.strength, manifest.log_prior, manifest.calibration)
            best = np.argsort(-probability, kind="stable")
            difference = golden.difference(best.tolist(), probability[best].tolist())
            if difference:
                raise WrongResponseError(f"student {release.version} answers a golden request wrongly: {difference}")


def send_whole_batch(url: str, release: Release, timeout: float) -> None:
    """Send `student` one request of max_batch_size images. Raises ServingError if it fails."""
    form = release.manifest.image
    with closing(Transport(url, timeout)) as transport:
        image = form.pixels(release.golden[-1].image_bytes())[None]
        _logits(transport, release.version, np.repeat(image, release.manifest.max_batch_size, axis=0), 0.0)


def _logits(transport: Transport, version: int, images: np.ndarray, strength: float) -> np.ndarray:
    inputs = {"image": images, "strength": np.full((len(images), 1), strength, dtype=np.float32)}
    return transport.infer(STUDENT, inputs, {"logits": 0}, str(version))[0]["logits"]

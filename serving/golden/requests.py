"""Send golden requests to a running server: both models of a release must return the responses stored in its export."""

from __future__ import annotations

from contextlib import closing

import numpy as np

from serving.client.sync_client import Client
from serving.golden.student_call import StudentCall
from serving.repository.release import Release
from serving.shared.errors import ServingError
from serving.shared.names import STUDENT
from serving.shared.priority import throttled
from serving.transport.retries import Retries
from serving.transport.sync_transport import Transport


class WrongResponseError(ServingError):
    """A server answered a golden request with other classes or probabilities than the export stored."""


def check_golden(client: Client, release: Release, pause: bool = True) -> None:
    """Send a release its golden requests. Raises ServingError if one fails or is answered wrongly.

    pause: wait after each request, so that user requests get most of the server's time.
    """
    for golden in throttled(release.golden) if pause else release.golden:
        answer = client.predict([golden.image_bytes()], golden.strength, version=release.version)[0]
        difference = golden.difference(answer.indexes, answer.probabilities)
        if difference:
            raise WrongResponseError(
                f"{release.manifest.image_model} {release.version} answers a golden request wrongly: {difference}"
            )


def check_student(
    url: str, release: Release, timeout: float, pause: bool = True, retries: Retries | None = None
) -> None:
    """Send the golden requests of a release to `student`, which the classifier of a small network does not use.

    pause: as in check_golden. Raises ServingError if one fails or is answered wrongly.
    """
    with closing(Transport(url, timeout, retries)) as transport:
        for golden in throttled(release.golden) if pause else release.golden:
            call = StudentCall(release.manifest, golden)
            output = transport.infer(STUDENT, call.inputs, {call.output: 0}, str(release.version))[0][call.output]
            difference = golden.difference(*call.answer(output[0]))
            if difference:
                raise WrongResponseError(f"student {release.version} answers a golden request wrongly: {difference}")


def send_whole_batch(url: str, release: Release, timeout: float) -> None:
    """Send `student` one request of max_batch_size images. Raises ServingError if it fails."""
    call = StudentCall(release.manifest, release.golden[-1])
    inputs = {name: np.repeat(row, release.manifest.max_batch_size, axis=0) for name, row in call.inputs.items()}
    with closing(Transport(url, timeout)) as transport:
        transport.infer(STUDENT, inputs, {call.output: 0}, str(release.version))

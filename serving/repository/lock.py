"""The lock of a model repository: whoever changes what is served holds it alone, whoever only reads it shares it.

A server that starts shares it until it answers. Else a promotion could change the policies while Triton reads them, and
say that nobody runs on the repository while one is about to, with the version of before.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from serving.shared.errors import RepositoryError, ServingError

LOCK_TIMEOUT = 60.0  # seconds
POLL = 0.05  # seconds


class RepositoryBusy(ServingError):
    """Somebody else holds the repository's lock."""


@contextlib.contextmanager
def locked(repository: Path, shared: bool = False, timeout: float = LOCK_TIMEOUT) -> Iterator[None]:
    """Hold the repository's lock; it ends with this process. Raises RepositoryBusy if it is not to be had in time."""
    try:
        descriptor = os.open(repository, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise RepositoryError(f"{repository}: {error.strerror}; run `dvc repro` or give --repository") from None
    try:
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise RepositoryBusy(
                        f"{repository}: a promotion, a repair or the start of a server is under way; try again later"
                    ) from None
                time.sleep(POLL)
        yield
    finally:
        os.close(descriptor)

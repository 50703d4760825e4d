"""File lock of a model repository: exclusive for a promotion or rollback, shared for a server start or a repair.

Why: a starting server holds the shared lock until it is ready. Without it a promotion could change the version policies
while Triton reads them, or find no running server while one is starting with the old version.
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
    """Another process holds the repository's lock."""


@contextlib.contextmanager
def locked(repository: Path, shared: bool = False, timeout: float = LOCK_TIMEOUT) -> Iterator[None]:
    """Hold the repository's lock (flock on its folder, released when the process exits).

    timeout: seconds to wait for it. Raises RepositoryBusy if another process holds it until then, RepositoryError if
    the folder cannot be opened.
    """
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

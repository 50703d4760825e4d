"""Settings of all tests, and what makes each independent of the tests before it, whichever files run together."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("tailor", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("tailor")
# Of 28 s that it takes to import all that the tests import, 7 went to collections that found next to nothing.
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _process_as_before() -> Iterator[None]:
    """The same random numbers and one thread for each test, as tests run in parallel; restore what it changes.

    A command called in the test's own process sets NO_PROXY and the exception hook.
    """
    directory, environment, hook = Path.cwd(), dict(os.environ), sys.excepthook
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_num_threads(1)
    yield
    os.chdir(directory)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    sys.excepthook = hook

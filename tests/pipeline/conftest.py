"""Settings of this folder: reproducible property tests, and one thread each, as the tests themselves run in parallel."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("pipeline", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("pipeline")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _working_directory():
    """A test that changes the working directory changes it for itself alone."""
    before = Path.cwd()
    yield
    os.chdir(before)

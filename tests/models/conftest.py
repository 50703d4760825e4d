"""Settings of this folder: reproducible property tests, and one thread each, as the tests themselves run in parallel."""

import torch
from hypothesis import settings

settings.register_profile("models", deadline=None, derandomize=True, max_examples=80)
settings.load_profile("models")
torch.set_num_threads(1)

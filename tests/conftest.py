"""Settings of all tests, and a fixture that isolates each test from the tests before it in the same process."""

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
# Importing everything that the tests import takes 28 s, 7 s of them in garbage collections that free almost nothing.
gc.disable()


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") == "loadgroup" and pytest.version_tuple >= (9, 2):
        raise pytest.UsageError(
            f"pytest is {pytest.__version__}, which drops the groups of pytest-xdist; expected below 9.2: run `make install`"
        )


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = sum("GPU" in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    if skipped:
        terminalreporter.write_line(f"{skipped} of the skipped tests need a GPU")


@pytest.fixture(autouse=True)
def restore_process_state() -> Iterator[None]:
    """Seed the random generators and use one thread (tests run in parallel); restore process state after each test.

    A command called in the test's process sets NO_PROXY and the exception hook.
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

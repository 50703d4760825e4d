"""Type and assertions for tests that run the command `tailor`."""

from __future__ import annotations

from collections.abc import Callable
from subprocess import CompletedProcess

Tailor = Callable[..., CompletedProcess[str]]


def assert_one_line(ended: CompletedProcess[str], status: int, *parts: str) -> None:
    assert ended.returncode == status, ended
    assert ended.stdout == ""
    assert ended.stderr.startswith("tailor: ")
    assert ended.stderr.count("\n") == 1, ended.stderr
    for part in parts:
        assert part in ended.stderr

"""Errors that a user can act on. Each message is one line naming the file, key or argument and what would be right."""

from __future__ import annotations


class StageError(Exception):
    """A stage cannot go on. Exit code 1."""

    exit_code = 1


class ParamsError(StageError):
    """params.yaml or an argument is not usable. Exit code 2."""

    exit_code = 2


class DataError(StageError):
    """The data are not usable: a file, a label or a count. Exit code 1."""

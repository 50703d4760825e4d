"""Errors that a user can act on: each is one line naming the file, argument or address and what would be right."""

from __future__ import annotations


class TailorError(Exception):
    """The base of every error that a user can act on, of serving and of the pipeline. Exit code 1."""

    exit_code = 1


class ServingError(TailorError):
    """Serving fails: no server, a refused request, a release whose files do not belong together. Exit code 1."""


class InputError(ServingError):
    """The caller's input is not usable: an image, a prior, an address or an option. Exit code 2."""

    exit_code = 2


class RepositoryError(ServingError):
    """A model repository that cannot be written or does not hold together; the message names the file."""

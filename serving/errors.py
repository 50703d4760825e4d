"""Errors that a user can act on: each is one line naming the file, argument or address and what would be right."""

from __future__ import annotations


class ServingError(Exception):
    """Serving cannot go on: no server, a refused request, a release that does not hold together. Exit code 1."""

    exit_code = 1


class InputError(ServingError):
    """What the caller gave is not usable: an image, a prior, an address or an option. Exit code 2."""

    exit_code = 2

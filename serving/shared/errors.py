"""Error classes, and the text of errors about missing extras.

Each message is one line that names the file, argument or address and what is allowed.
"""

from __future__ import annotations


class TailorError(Exception):
    """Base class of the errors of serving and of the pipeline that a user can correct. Exit code 1."""

    exit_code = 1


class ServingError(TailorError):
    """Serving failed: no server, a rejected request, a release whose files do not match. Exit code 1."""


class InputError(ServingError):
    """Invalid input of the caller: an image, a prior, an address or an option. Exit code 2."""

    exit_code = 2


class RepositoryError(ServingError):
    """A model repository that cannot be written or is inconsistent; the message names the file."""


def install_command(*extras: str) -> str:
    """Return the text that states how to install extras of pyproject.toml. Tailor is on no package index."""
    return f"run `pip install -e '.[{','.join(extras)}]'` in Tailor's source folder"

"""The command line of the Triton server, and the admin key that restricts its model control."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from serving.server.installation import Installation
from serving.server.local_tree import TREE
from serving.shared.errors import InputError
from serving.shared.names import ADMIN_HEADER, ADMIN_KEY_VARIABLE, CLASSIFIER, LOCAL_CONFIG, STUDENT

# Endpoints that need the admin key. A caller that may load a model can run code in the server; the other endpoints read
# or change data of other callers. model-config stays open: it is read-only, and clients read max_batch_size and the
# default strength from it.
RESTRICTED = "model-repository,shared-memory,statistics,trace,logging"
STUB_START_TIMEOUT = 120  # seconds for an inference process to load its model


def triton_arguments(
    installation: Installation,
    runtime: Path,
    prefix: str,
    host: str,
    ports: Mapping[str, int],
    key: str,
    grace: int,
    options: Sequence[str] = (),
) -> list[str]:
    """The command line of the server.

    runtime: the runtime folder, with `backends` and the tree of links to the repository. prefix: of the run, for its
    shared memory. ports: by option. grace: seconds that running requests get on SIGTERM. options: further options of
    Triton (see server_options).
    """
    return [
        str(installation.server),
        f"--model-repository={runtime / TREE}",
        f"--backend-directory={runtime / 'backends'}",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
        f"--backend-config=python,stub-timeout-seconds={STUB_START_TIMEOUT}",
        f"--model-config-name={LOCAL_CONFIG}",
        "--model-control-mode=explicit",
        f"--load-model={STUDENT}",
        f"--load-model={CLASSIFIER}",
        # The configs are complete; completing them would start one more inference process per model.
        "--disable-auto-complete-config",
        # Without this a failed load of a new version makes the server not ready, although the old version serves.
        "--strict-readiness=false",
        f"--exit-timeout-secs={grace}",
        f"--http-address={host}",
        f"--grpc-address={host}",
        *(f"{option}={port}" for option, port in ports.items()),
        f"--http-restricted-api={RESTRICTED}:{ADMIN_HEADER}={key}",
        f"--grpc-restricted-protocol={RESTRICTED}:{ADMIN_HEADER}={key}",
        *options,
    ]


def admin_key() -> str | None:
    """The admin key in the variable TAILOR_ADMIN_KEY; None if it is not set. Raises InputError for a weak one."""
    key = os.environ.get(ADMIN_KEY_VARIABLE)
    if key is not None and not re.fullmatch(r"[A-Za-z0-9_-]{16,}", key):
        raise InputError(f"{ADMIN_KEY_VARIABLE} is not usable; expected at least 16 letters, digits, - or _")
    return key


def new_admin_key() -> str:
    """A new random admin key.

    Triton accepts it only on the command line, so other local users can read it with ps. It is not logged.
    """
    return secrets.token_urlsafe(32)

"""The arguments that the Triton server is started with, and the key to its model control."""

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

# Whoever may load a model may run code in the server; the others read or change what is not theirs. model-config stays
# open: reading it changes nothing, and clients take max_batch_size and the default strength from it.
RESTRICTED = "model-repository,shared-memory,statistics,trace,logging"
STUB_START_TIMEOUT = 120  # seconds for one model's stub to load


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
    """The command line. runtime: holds `backends` and the repository's tree; ports by option; grace: seconds on SIGTERM;
    options: further ones of Triton's own (see server_options).
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
        # Completing a config would start a throw-away stub per model, and the configs are whole.
        "--disable-auto-complete-config",
        # Otherwise one failed load of a new version turns the server unready while the old one serves on.
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
    """The user's secret for loading models and the like, None where none is set. Raises InputError for a weak one."""
    key = os.environ.get(ADMIN_KEY_VARIABLE)
    if key is not None and not re.fullmatch(r"[A-Za-z0-9_-]{16,}", key):
        raise InputError(f"{ADMIN_KEY_VARIABLE} is not usable; expected at least 16 letters, digits, - or _")
    return key


def new_admin_key() -> str:
    """A key that nobody knows yet.

    Triton takes it on its command line alone, so other local users can read it with ps; it is in no log.
    """
    return secrets.token_urlsafe(32)

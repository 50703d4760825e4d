"""Load and unload models of a running server: Triton's explicit model control, with the admin key, over gRPC.

Not over HTTP: there a load blocks every request on the same worker thread.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from serving.repository.version_policy import served_versions
from serving.server.leftovers import processes_of
from serving.server.local_tree import refresh_trees
from serving.server.running import RunningServer
from serving.shared.errors import ServingError
from serving.shared.names import ADMIN_HEADER
from serving.transport.sync_transport import parse_url

REASON_LENGTH = 500
FOLDER_TIMEOUT = 10.0  # seconds for a server to see that a version was published or removed
UNREADABLE = "failed to poll from model repository"  # from Triton's error message
DEAD_STUB_TIMEOUT = 10.0  # seconds for Triton to detect that an inference process has exited


class LoadTimeout(ServingError):
    """A load or unload that did not end within the timeout."""


class UnreadableModel(ServingError):
    """Triton could not read a model's folder, for example because a link points to a removed version."""


class ModelControl:
    """A gRPC connection for loading and unloading a server's models. A context manager.

    timeout: seconds that a load may take. Its methods raise ServingError naming the model and Triton's reason.
    """

    def __init__(self, server: RunningServer, timeout: float) -> None:
        self.server = server
        self.timeout = timeout
        _, secure, address = parse_url(server.grpc_url)
        trusted = _trust(server.certificate, address, timeout) if server.certificate else {}
        self._client = tritonclient.grpc.InferenceServerClient(address, ssl=secure, **trusted)
        self._headers = {f"triton-grpc-protocol-{ADMIN_HEADER}": server.admin_key}

    def load(self, model: str) -> None:
        """Load the versions that the model's config lists; other versions are unloaded when these are ready.

        A loaded version is not reloaded, unless its files or more of the config than versions and instances have
        changed. Triton skips a version whose folder it does not see, and loads nothing while a link points to a removed
        version. The server's supervisor or the mount may show the folder later, so the load is retried for FOLDER_TIMEOUT
        seconds. Raises LoadTimeout when a load takes too long.
        """
        repository = Path(self.server.repository)
        deadline = time.monotonic() + FOLDER_TIMEOUT
        while True:
            if self.server.prefix:
                refresh_trees(repository, self.server.prefix)
            try:
                self._request(model, "load", self._client.load_model)
                missing = sorted({*served_versions(repository, model)} - {*self.ready_versions(model)})
                if not missing:
                    return
                if time.monotonic() > deadline:
                    raise ServingError(
                        f"{self.server.grpc_url}: has no version {missing[0]} of {model}; "
                        f"expected a server that runs on {repository}"
                    )
            except UnreadableModel:
                # With a prefix, refresh_trees has just updated the links: a retry would find the same.
                if self.server.prefix or time.monotonic() > deadline:
                    raise
            time.sleep(0.2)

    def unload(self, model: str) -> None:
        """Unload every version of a model and wait until none is ready."""
        self._request(model, "unload", self._client.unload_model)
        deadline = time.monotonic() + self.timeout
        while self.ready_versions(model):
            if time.monotonic() > deadline:
                raise ServingError(f"{self.server.grpc_url}: {model} is not unloaded after {self.timeout:g} s")
            time.sleep(0.05)

    def ready_versions(self, model: str) -> list[int]:
        """The versions of a model that are ready, ascending."""
        return sorted(int(entry.version) for entry in self._index(model) if entry.state == "READY")

    def end_hanging_load(self, model: str, version: int) -> bool:
        """Kill the inference processes of a version whose load hangs; returns whether Triton can load models again.

        Triton waits forever for an inference process (its stub) that does not finish loading, and every later load
        waits too. Possible only for a server of this user on this machine and a model of the python backend.
        """
        program = f"/{model}/{version}/model.py"
        ended = False
        if self.server.prefix:
            for process in processes_of(self.server.prefix):
                with contextlib.suppress(psutil.Error):  # it has exited
                    if any(argument.endswith(program) for argument in process.cmdline()):
                        process.kill()
                        ended = True
        deadline = time.monotonic() + DEAD_STUB_TIMEOUT
        while ended and time.monotonic() < deadline:
            if not any(entry.state == "LOADING" for entry in self._index(model)):
                return True
            time.sleep(0.1)
        return False

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def __enter__(self) -> ModelControl:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _request(self, model: str, action: str, call: Callable[..., None]) -> None:
        try:
            call(model, headers=self._headers, client_timeout=self.timeout)
        except InferenceServerException as error:
            if "DEADLINE_EXCEEDED" in str(error.status()):
                raise LoadTimeout(
                    f"{self.server.grpc_url}: the {action} of {model} did not end within {self.timeout:g} s"
                ) from error
            kind = UnreadableModel if UNREADABLE in str(error.message()) else ServingError
            raise kind(f"{self.server.grpc_url}: Triton did not {action} {model}: {_reason(error)}") from error

    def _index(self, model: str) -> list[Any]:
        """The entries of a model's versions in Triton's repository index. Raises ServingError."""
        try:
            index = self._client.get_model_repository_index(headers=self._headers, client_timeout=self.timeout)
        except InferenceServerException as error:
            raise ServingError(f"{self.server.grpc_url}: {_reason(error)}") from error
        return [entry for entry in index.models if entry.name == model]


def _trust(certificate: str, address: str, timeout: float) -> dict[str, Any]:
    """Arguments of the gRPC client that trust only this certificate, whatever name it has. Raises ServingError."""
    try:
        context = ssl.create_default_context(cafile=certificate)
        context.check_hostname = False  # the certificate names a public host; this connection uses a local address
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.set_alpn_protocols(["h2"])
        host, _, port = address.rpartition(":")
        with (
            socket.create_connection((host.strip("[]"), int(port)), timeout) as plain,
            context.wrap_socket(plain) as tls,
        ):
            names = (tls.getpeercert() or {}).get("subjectAltName", ())
    except (OSError, ValueError) as error:
        raise ServingError(
            f"grpcs://{address}: does not present {certificate}: {error}; start the server again"
        ) from None
    arguments: dict[str, Any] = {"root_certificates": certificate}
    if names:
        name = str(names[0][1]).replace("*", "any", 1)
        arguments["channel_args"] = [("grpc.ssl_target_name_override", name)]
    return arguments


def _reason(error: InferenceServerException) -> str:
    reason = " ".join(str(error.message()).split())
    if "restricted" in reason.lower():
        return "the admin key is not this server's; set TAILOR_ADMIN_KEY to the one it was started with"
    return reason[:REASON_LENGTH]

"""Triton's explicit model control: load and unload models of a running server, with its key, over gRPC.

Never over HTTP: there a load holds up every request that shares its worker thread.
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
SEEN_WITHIN = 10.0  # seconds that a server gets to see a version that was just published, or that one has gone
UNREADABLE = "failed to poll from model repository"  # Triton's words
DEAD_STUB_TIMEOUT = 10.0  # seconds for Triton to notice that a stub has gone


class LoadTimeout(ServingError):
    """A load that did not end in time."""


class UnreadableModel(ServingError):
    """Triton could not read a model's folder, as where a link in it leads to a version that has been removed."""


class ModelControl:
    """Control over a server's models. A context manager. timeout: seconds that a load may take.

    Its methods raise ServingError naming the model and Triton's reason.
    """

    def __init__(self, server: RunningServer, timeout: float) -> None:
        self.server = server
        self.timeout = timeout
        _, secure, address = parse_url(server.grpc_url)
        trusted = _trust(server.certificate, address, timeout) if server.certificate else {}
        self._client = tritonclient.grpc.InferenceServerClient(address, ssl=secure, **trusted)
        self._headers = {f"triton-grpc-protocol-{ADMIN_HEADER}": server.admin_key}

    def load(self, model: str) -> None:
        """Load the versions of the model's present config; unlisted ones are unloaded when the others are ready.

        What is loaded already stays as it is, unless its files or more of the config than its versions and instances have
        changed. Triton passes over a version whose folder it does not see, and loads nothing while a link leads to one that
        has gone. Its supervisor or the mount may be about to show what there is, so it is asked again for a while. Raises
        LoadTimeout when a load takes too long.
        """
        repository = Path(self.server.repository)
        deadline = time.monotonic() + SEEN_WITHIN
        while True:
            if self.server.prefix:
                refresh_trees(repository, self.server.prefix)
            try:
                self._ask(model, "load", self._client.load_model)
                missing = sorted({*served_versions(repository, model)} - {*self.ready_versions(model)})
                if not missing:
                    return
                if time.monotonic() > deadline:
                    raise ServingError(
                        f"{self.server.grpc_url}: sees no version {missing[0]} of {model}; "
                        f"expected a server that runs on {repository}"
                    )
            except UnreadableModel:
                if self.server.prefix or time.monotonic() > deadline:  # what we have linked ourselves will not change
                    raise
            time.sleep(0.2)

    def unload(self, model: str) -> None:
        """Unload every version of a model and wait until it is gone."""
        self._ask(model, "unload", self._client.unload_model)
        deadline = time.monotonic() + self.timeout
        while self.ready_versions(model):
            if time.monotonic() > deadline:
                raise ServingError(f"{self.server.grpc_url}: {model} is not unloaded after {self.timeout:g} s")
            time.sleep(0.05)

    def ready_versions(self, model: str) -> list[int]:
        """The versions of a model that are loaded, ascending."""
        return sorted(int(found.version) for found in self._index(model) if found.state == "READY")

    def end_hanging_load(self, model: str, version: int) -> bool:
        """Kill the stubs of a version whose load hangs, so that Triton gives it up; whether it then could load again.

        Triton waits forever for an inference process (its stub) that does not finish loading, and so does every later load.
        Possible only where the server is on this machine and its stub is a process.
        """
        place = f"/{model}/{version}/model.py"
        ended = False
        if self.server.prefix:
            for process in processes_of(self.server.prefix):
                with contextlib.suppress(psutil.Error):  # it has just ended by itself
                    if any(argument.endswith(place) for argument in process.cmdline()):
                        process.kill()
                        ended = True
        deadline = time.monotonic() + DEAD_STUB_TIMEOUT
        while ended and time.monotonic() < deadline:
            if not any(found.state == "LOADING" for found in self._index(model)):
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

    def _ask(self, model: str, what: str, call: Callable[..., None]) -> None:
        try:
            call(model, headers=self._headers, client_timeout=self.timeout)
        except InferenceServerException as error:
            if "DEADLINE_EXCEEDED" in str(error.status()):
                raise LoadTimeout(
                    f"{self.server.grpc_url}: the {what} of {model} did not end within {self.timeout:g} s"
                ) from error
            kind = UnreadableModel if UNREADABLE in str(error.message()) else ServingError
            raise kind(f"{self.server.grpc_url}: Triton did not {what} {model}: {_reason(error)}") from error

    def _index(self, model: str) -> list[Any]:
        """Triton's index entries of a model's versions. Raises ServingError."""
        try:
            index = self._client.get_model_repository_index(headers=self._headers, client_timeout=self.timeout)
        except InferenceServerException as error:
            raise ServingError(f"{self.server.grpc_url}: {_reason(error)}") from error
        return [found for found in index.models if found.name == model]


def _trust(certificate: str, address: str, timeout: float) -> dict[str, Any]:
    """The client's arguments that trust this certificate alone, for whatever name it was issued. Raises ServingError."""
    try:
        context = ssl.create_default_context(cafile=certificate)
        context.check_hostname = False  # the key to it lies on this machine; we reach it by another name than others do
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        context.set_alpn_protocols(["h2"])
        host, _, port = address.rpartition(":")
        with (
            socket.create_connection((host.strip("[]"), int(port)), timeout) as plain,
            context.wrap_socket(plain) as tls,
        ):
            names = (tls.getpeercert() or {}).get("subjectAltName", ())
    except (OSError, ValueError) as error:
        raise ServingError(f"grpcs://{address}: does not show {certificate}: {error}; start the server again") from None
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

"""Server records: find the running servers of a repository. Each server writes one into its private runtime folder."""

from __future__ import annotations

import contextlib
import http.client
import os
import tempfile
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from serving.server.arguments import admin_key
from serving.server.leftovers import owner_exists
from serving.shared.atomic import write_file
from serving.shared.errors import InputError
from serving.shared.names import ADMIN_KEY_VARIABLE

RECORD_NAME = "server.json"


class RunningServer(BaseModel):
    """The record of a server: addresses and admin key for model control.

    prefix: of its run (see leftovers); None for a server that this user did not start here. certificate: the PEM file
    of its gRPC certificate; None if gRPC is not encrypted or the system's CAs verify it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    repository: str
    http_url: str | None
    grpc_url: str
    admin_key: str
    prefix: str | None
    certificate: str | None = None

    @property
    def url(self) -> str:
        """Address for inference: gRPC, or HTTP if gRPC has a certificate, which may name another host."""
        return self.http_url if self.certificate and self.http_url else self.grpc_url


def write_server_record(runtime: Path, server: RunningServer) -> None:
    """Write the server record, which contains the admin key, into the runtime folder, which only this user can read."""
    write_file(runtime / RECORD_NAME, server.model_dump_json())


def server_by_address(repository: Path, grpc_url: str, key: str) -> RunningServer:
    """A server by address and admin key; with the other fields of its record if this user runs it on this machine."""
    for server in find_running(repository):
        if server.grpc_url == grpc_url.rstrip("/"):
            return server.model_copy(update={"admin_key": key})
    return RunningServer(repository=str(repository), http_url=None, grpc_url=grpc_url, admin_key=key, prefix=None)


def servers_at(repository: Path, url: str | None) -> list[RunningServer] | None:
    """The server at `url`, with the key in TAILOR_ADMIN_KEY; None for no `url`: the caller then uses `find_running`.

    Raises InputError if the address is not a gRPC address or the key is not set.
    """
    if url is None:
        return None
    if not url.startswith(("grpc://", "grpcs://")):
        raise InputError(f"--url is {url!r}; expected grpc://host:port, as loads never go over HTTP")
    key = admin_key()
    if key is None:
        raise InputError(f"{ADMIN_KEY_VARIABLE} is not set; expected the key that the server at {url} was started with")
    return [server_by_address(repository, url, key)]


def find_running(repository: Path) -> list[RunningServer]:
    """The running servers of this user on a repository, by their records in the folder for temporary files and /tmp."""
    path, servers = os.path.realpath(repository), []
    for parent in sorted({tempfile.gettempdir(), "/tmp"}):
        for folder in sorted(Path(parent).glob("tailor_*")):
            with contextlib.suppress(OSError, ValidationError):  # not readable, just removed, or of another format
                if folder.stat().st_uid != os.geteuid():  # any user may create a folder of this name
                    continue
                server = RunningServer.model_validate_json((folder / RECORD_NAME).read_bytes())
                if server.repository == path and server.prefix == folder.name[: len(server.prefix or "?")]:
                    servers += [server] * owner_exists(server.prefix or "")
    return servers


def is_ready(host: str, port: int) -> bool:
    """Whether a server answers over HTTP that it is ready."""
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()

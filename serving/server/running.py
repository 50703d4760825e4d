"""Which servers run on a repository, and how to reach them: a note that each leaves in its private runtime folder."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from serving.server.arguments import admin_key
from serving.server.leftovers import owner_lives
from serving.shared.atomic import write_file
from serving.shared.errors import InputError
from serving.shared.names import ADMIN_KEY_VARIABLE

NOTE_NAME = "server.json"


class RunningServer(BaseModel):
    """A server's addresses and the key to its model control. `prefix` is its run's, None where another started it.

    certificate: the PEM file of what it shows on gRPC, None where that is not encrypted, or the system knows its CA.
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
        """Where it is asked: over gRPC, and where its certificate may name another host, over HTTP beside it."""
        return self.http_url if self.certificate and self.http_url else self.grpc_url


def leave_note(runtime: Path, server: RunningServer) -> None:
    """Write the note into the runtime folder, which nobody but its owner can read: it holds the key."""
    write_file(runtime / NOTE_NAME, server.model_dump_json())


def reach(repository: Path, grpc_url: str, key: str) -> RunningServer:
    """The server at an address that somebody named, with its key; as its own note says where this user runs it here."""
    for server in find_running(repository):
        if server.grpc_url == grpc_url.rstrip("/"):
            return server.model_copy(update={"admin_key": key})
    return RunningServer(repository=str(repository), http_url=None, grpc_url=grpc_url, admin_key=key, prefix=None)


def servers_at(repository: Path, url: str | None) -> list[RunningServer] | None:
    """The server at `url`, whose key is in TAILOR_ADMIN_KEY; None for those of this machine, which promotion finds.

    Raises InputError where the address is not one of gRPC or the key is not set.
    """
    if url is None:
        return None
    if not url.startswith(("grpc://", "grpcs://")):
        raise InputError(f"--url is {url!r}; expected grpc://host:port, as loads never go over HTTP")
    key = admin_key()
    if key is None:
        raise InputError(f"{ADMIN_KEY_VARIABLE} is not set; expected the key that the server at {url} was started with")
    return [reach(repository, url, key)]


def find_running(repository: Path) -> list[RunningServer]:
    """The servers of this user that run on this repository, as far as they share our folder for temporary files."""
    wanted, found = os.path.realpath(repository), []
    for parent in sorted({tempfile.gettempdir(), "/tmp"}):
        for folder in sorted(Path(parent).glob("tailor_*")):
            with contextlib.suppress(OSError, ValidationError):  # not ours to read, going just now, or no note of ours
                if folder.stat().st_uid != os.geteuid():  # whoever else may name a folder so
                    continue
                server = RunningServer.model_validate_json((folder / NOTE_NAME).read_bytes())
                if server.repository == wanted and server.prefix == folder.name[: len(server.prefix or "?")]:
                    found += [server] * owner_lives(server.prefix or "")
    return found

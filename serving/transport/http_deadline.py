"""HTTP connections with one deadline for connecting, sending, and reading the response header and body.

A socket timeout restarts with each byte, so a server that sends one byte per second would block the caller forever.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from urllib3.connection import HTTPConnection, HTTPSConnection


def timed_connection(secure: bool, remaining: Callable[[], float]) -> type[HTTPConnection]:
    """Return urllib3's connection class with deadlines; `remaining` returns the seconds of the current call, or raises."""

    class Timed(HTTPSConnection if secure else HTTPConnection):  # type: ignore[misc]
        def connect(self) -> None:
            super().connect()
            self.sock = _TimedSocket(self.sock, remaining)

    return Timed


class _TimedSocket:
    """A socket whose blocking operations end at the deadline of the current call."""

    def __init__(self, sock: Any, remaining: Callable[[], float]) -> None:
        self._sock = sock
        self._remaining = remaining

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(self._remaining())
        self._sock.sendall(data)  # the timeout of sendall covers the whole call

    def makefile(self, mode: str, *_arguments: Any, **_options: Any) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._sock, self._sock.makefile(mode, buffering=0), self._remaining))


class _TimedReader(io.RawIOBase):
    """Raw reader of a socket that applies the deadline to each read."""

    def __init__(self, sock: Any, raw: io.RawIOBase, remaining: Callable[[], float]) -> None:
        self._sock, self._raw, self._remaining = sock, raw, remaining

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._remaining())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()

"""HTTP connections that keep a deadline over everything: connecting, sending, a header or a body that only trickles in.

A socket's own timeout counts from the last byte, so a server that sends one byte a second holds its caller for ever.
"""

from __future__ import annotations

import io
import time
from typing import Any

from urllib3.connection import HTTPConnection, HTTPSConnection


def timed_connection(secure: bool) -> type[HTTPConnection]:
    """urllib3's connection class with deadlines; it takes `current`, whose attribute `deadline` is the one to keep."""
    return _TimedHttps if secure else _TimedHttp


class _Timed:
    """Wraps the socket once it is connected."""

    def __init__(self, *arguments: Any, current: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._current = current

    def connect(self) -> None:
        super().connect()  # type: ignore[misc]
        self.sock = _TimedSocket(self.sock, self._current)


class _TimedHttp(_Timed, HTTPConnection):
    pass


class _TimedHttps(_Timed, HTTPSConnection):
    pass


class _TimedSocket:
    """A socket whose every wait ends with the deadline of the call that is being made."""

    def __init__(self, sock: Any, current: Any) -> None:
        self._sock = sock
        self._current = current

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(_left(self._current))
        self._sock.sendall(data)  # Python's own bound on sendall is already one for the whole

    def makefile(self, mode: str, *_arguments: Any, **_options: Any) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._sock, self._sock.makefile(mode, buffering=0), self._current))


class _TimedReader(io.RawIOBase):
    """The reading end of a socket."""

    def __init__(self, sock: Any, raw: io.RawIOBase, current: Any) -> None:
        self._sock, self._raw, self._current = sock, raw, current

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_left(self._current))
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


def _left(current: Any) -> float:
    left = current.deadline.ends - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    return left

"""TCP ports for the server: whether a wanted one is free, and free ones where none is wanted."""

from __future__ import annotations

import errno
import os
import random
import socket
from collections.abc import Collection, Mapping

from serving.errors import InputError, ServingError

# Below the range that Linux hands to outgoing connections (32768 up), so that none of those takes a port between the
# moment it is found free and the moment the server binds it.
LOWEST_FREE, HIGHEST_FREE = 20000, 32000
ATTEMPTS = 200


def choose_ports(host: str, wanted: Mapping[str, int]) -> dict[str, int]:
    """The ports to open by option, a free one where 0 is wanted.

    Raises InputError for a bad host or number and for two options that want the same port, ServingError when a port is
    taken.
    """
    chosen: dict[str, int] = {}
    for option, port in sorted(wanted.items(), key=lambda item: item[1] == 0):
        chosen[option] = port or _free_port(host, taken=chosen.values())
        if port:
            _check_port(host, port, option)
            for other, same in chosen.items():
                if same == port and other != option:
                    raise InputError(f"{option} is {port} and so is {other}; expected different ports")
    return chosen


def _check_port(host: str, port: int, option: str) -> None:
    if not 1 <= port <= 65535:
        raise InputError(f"{option} is {port}; expected a port from 1 to 65535, or 0 for any free one")
    try:
        with _bound(host, port):
            return
    except socket.gaierror:
        raise InputError(
            f"--host is {host!r}; expected an IPv4 address of this machine, for example 127.0.0.1"
        ) from None
    except PermissionError:
        raise ServingError(f"{option} {port}: this user may not open it; give a port above 1023") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ServingError(
                f"{option} {port}: the port is in use on {host}; stop what uses it or give another {option}"
            ) from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise InputError(
                f"--host is {host!r}, no address of this machine; expected for example 127.0.0.1"
            ) from None
        raise ServingError(f"{option} {port} on {host}: {error.strerror}") from None


def _free_port(host: str, taken: Collection[int]) -> int:
    for _ in range(ATTEMPTS):
        port = random.SystemRandom().randint(LOWEST_FREE, HIGHEST_FREE)
        if port in taken:
            continue
        try:
            _check_port(host, port, "port")
        except InputError:
            raise
        except ServingError:
            continue
        return port
    raise ServingError(f"no free port found on {host} from {LOWEST_FREE} to {HIGHEST_FREE}; give the ports yourself")


def _bound(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0]
    opened = socket.socket(family, kind, protocol)
    try:
        # As servers do: a port whose last connections are still in TIME_WAIT counts as free.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError:
        opened.close()
        raise
    return opened


def bypass_proxy_on_loopback() -> None:
    """Have every HTTP client of this process and its children reach loopback directly, whatever HTTP_PROXY says."""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    names = [name.strip() for name in given.split(",") if name.strip()]
    if "*" not in names:
        names += [name for name in ("127.0.0.1", "localhost", "::1") if name not in names]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(names)

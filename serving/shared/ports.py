"""TCP ports of servers: check requested ports, choose free ones; make HTTP clients bypass a proxy on loopback."""

from __future__ import annotations

import errno
import os
import random
import socket
import urllib.request
from collections.abc import Mapping
from importlib.util import find_spec

from serving.shared.errors import InputError, ServingError

# Below Linux's ports for outgoing connections (from 32768), which could take a chosen port before the server opens it.
FREE_PORTS, ATTEMPTS = range(20000, 32001), 200
PROBLEMS = {
    errno.EADDRINUSE: "the port is in use on {host}; stop what uses it or give another {option}",
    errno.EACCES: "this user may not open it; give a port above 1023",
}


def choose_ports(host: str, requested: Mapping[str, int]) -> dict[str, int]:
    """The port to open for each option; a free one where 0 is requested.

    Raises InputError for a bad host or number and for two options with the same port, ServingError for a port in use.
    """
    chosen: dict[str, int] = {}
    for option, port in sorted(requested.items(), key=lambda item: item[1] == 0):
        if not 0 <= port <= 65535:
            raise InputError(f"{option} is {port}; expected a port from 1 to 65535, or 0 for any free one")
        for other in (name for name, used in chosen.items() if used == port):
            raise InputError(f"{option} is {port} and so is {other}; expected different ports")
        # Random numbers of the system: two processes with the same seed would choose the same ports.
        for candidate in [port] if port else random.SystemRandom().sample(FREE_PORTS, ATTEMPTS):
            problem = _bind_problem(host, candidate)
            if problem is None and candidate not in chosen.values():
                chosen[option] = candidate
                break
        else:
            raise ServingError(f"{option} {port}: {problem}".format(host=host, option=option))
    return chosen


def _bind_problem(host: str, port: int) -> str | None:
    """The reason why a server cannot open the port, else None. Raises InputError for a host of another machine."""
    try:
        with socket.socket() as server:
            # Triton and nginx set it too: a port whose last connections are in TIME_WAIT is free.
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4])
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            hint = "expected an IPv4 address of this machine, for example 127.0.0.1"
            raise InputError(f"--host is {host!r}; {hint}") from None
        return PROBLEMS.get(error.errno or 0, error.strerror)
    return None


def bypass_proxy_on_loopback() -> None:
    """Make the HTTP clients of this process and its children connect to loopback without the proxy of HTTP_PROXY."""
    excluded = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    names = [name.strip() for name in excluded.split(",") if name.strip()]
    if "*" not in names:
        names += [name for name in ("127.0.0.1", "localhost", "::1") if name not in names]
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(names)


def check_proxies() -> None:
    """Raise InputError for a SOCKS proxy in the environment that httpx, the HTTP client of Prefect and Gradio, cannot use.

    httpx then fails when a client is created, also for an address on loopback, which it would reach without the proxy.
    """
    for name, url in urllib.request.getproxies_environment().items():
        if url.startswith("socks") and find_spec("socksio") is None:
            raise InputError(
                f"{name.upper()}_PROXY is a SOCKS proxy, which needs the package socksio; run `pip install socksio`, or "
                "unset the variable for this command"
            )

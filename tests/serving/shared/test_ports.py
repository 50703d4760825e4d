"""Ports of servers: rejected and chosen ones."""

from __future__ import annotations

import re
import socket

import pytest

from serving.shared.errors import InputError, ServingError
from serving.shared.ports import choose_ports


def test_free_ports_differ_and_are_below_the_outgoing_ports() -> None:
    chosen = choose_ports("127.0.0.1", dict.fromkeys("abcdefgh", 0))
    assert len(set(chosen.values())) == 8
    for port in chosen.values():
        assert 20000 <= port <= 32000
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_a_requested_port_is_used_and_a_free_one_differs() -> None:
    port = choose_ports("127.0.0.1", {"--http-port": 0})["--http-port"]
    chosen = choose_ports("localhost", {"--grpc-port": 0, "--http-port": port})
    assert chosen["--http-port"] == port != chosen["--grpc-port"]


@pytest.mark.parametrize("port", [-1, 65536])
def test_an_invalid_port_number_is_rejected(port: int) -> None:
    with pytest.raises(InputError, match=f"--http-port is {port}; expected a port from 1 to 65535, or 0 for any free"):
        choose_ports("127.0.0.1", {"--http-port": port})


def test_two_options_with_one_port_are_rejected() -> None:
    with pytest.raises(InputError, match="--http-port is 7001 and so is --grpc-port; expected different ports"):
        choose_ports("127.0.0.1", {"--grpc-port": 7001, "--http-port": 7001})


def test_a_port_in_use_is_rejected_naming_the_option() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        message = f"--http-port {port}: the port is in use on 127.0.0.1; stop what uses it or give another --http-port"
        with pytest.raises(ServingError, match=re.escape(message)):
            choose_ports("127.0.0.1", {"--http-port": port})


@pytest.mark.parametrize("host", ["192.0.2.1", "::1", "", "no.such.host.invalid"])
@pytest.mark.parametrize("port", [0, 7001])
def test_a_host_of_another_machine_is_rejected(host: str, port: int) -> None:
    with pytest.raises(InputError, match=re.escape(f"--host is {host!r}; expected an IPv4 address of this machine")):
        choose_ports(host, {"--http-port": port})

"""Send many requests except for their last byte, then complete them, so that all are in flight at the same time."""

from __future__ import annotations

import http.client
import select
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import h2.events

from serving.transport.messages import Answer, Infer
from tests.support.bad_connections import HEADERS, connected, http2


class OverHttp:
    """HTTP requests, one connection each."""

    def __init__(self, port: int, calls: Sequence[Infer], stack: ExitStack) -> None:
        self._calls = calls
        self.sockets = [stack.enter_context(connected(port, timeout=60)) for _ in calls]
        for opened, call in zip(self.sockets, calls, strict=True):
            headers = {"Host": "tailor", "Content-Length": str(len(call.http.body)), **call.http.headers}
            head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
            opened.sendall(f"POST {call.http.path} HTTP/1.1\r\n{head}\r\n".encode() + call.http.body[:-1])

    def release(self) -> None:
        for opened, call in zip(self.sockets, self._calls, strict=True):
            opened.sendall(call.http.body[-1:])

    def answers(self) -> Iterator[Answer]:
        for opened, call in zip(self.sockets, self._calls, strict=True):
            response = http.client.HTTPResponse(opened)
            response.begin()
            body = response.read()
            assert response.status == 200, body
            yield call.read_http({name.lower(): value for name, value in response.headers.items()}, body)


class OverGrpc:
    """gRPC requests, one stream each on one connection; together at most HTTP/2's initial window of 64 KiB."""

    def __init__(self, port: int, calls: Sequence[Infer], stack: ExitStack) -> None:
        opened, self._connection = stack.enter_context(http2(port))
        opened.settimeout(60)
        self.sockets = [opened]
        self._calls: dict[int, Infer] = {}
        for call in calls:
            stream = self._connection.get_next_available_stream_id()
            self._calls[stream] = call
            self._connection.send_headers(stream, HEADERS)
            self._connection.send_data(stream, framed(call)[:-1])
        opened.sendall(self._connection.data_to_send())

    def release(self) -> None:
        for stream, call in self._calls.items():
            self._connection.send_data(stream, framed(call)[-1:], end_stream=True)
        self.sockets[0].sendall(self._connection.data_to_send())

    def answers(self) -> Iterator[Answer]:
        received, ended = dict.fromkeys(self._calls, b""), set()
        while len(ended) < len(self._calls):
            data = self.sockets[0].recv(65536)
            assert data, f"the connection was closed after {len(ended)} answers"
            for event in self._connection.receive_data(data):
                if isinstance(event, h2.events.DataReceived):
                    received[event.stream_id] += event.data
                    self._connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                elif isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    headers = {bytes(name): bytes(value) for name, value in event.headers}
                    assert headers.get(b"grpc-status", b"0") == b"0", headers
                elif isinstance(event, h2.events.StreamEnded):
                    ended.add(event.stream_id)
            self.sockets[0].sendall(self._connection.data_to_send())
        for stream, call in self._calls.items():
            yield call.read_message(received[stream][5:])


def framed(call: Infer) -> bytes:
    """Return the message of a call with gRPC's prefix: flag "not compressed" and length."""
    return b"\0" + struct.pack(">I", len(call.message)) + call.message


def answers_at_once(http_port: int, grpc_port: int, calls: Sequence[Infer]) -> list[Answer]:
    """Send calls, alternately over gRPC and HTTP, so that all are in flight at once; return the responses in order."""
    with ExitStack() as stack:
        held = [OverGrpc(grpc_port, calls[::2], stack), OverHttp(http_port, calls[1::2], stack)]
        early, _, _ = select.select(held[1].sockets, [], [], 0.5)
        assert not early, "a request was answered before its last byte"
        for one in held:
            one.release()
        answers: list[Answer] = [None] * len(calls)
        answers[::2], answers[1::2] = (list(one.answers()) for one in held)
        return answers

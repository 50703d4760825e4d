"""Minimal gRPC client of the load generator: one HTTP/2 connection, one prepared call at a time, no library.

The official gRPC client takes a multiple of its CPU time per call, on cores that the server needs.
"""

from __future__ import annotations

import struct

from benchmarks.serving_load import READ, LoadError, connect, send_all
from serving.transport.messages import SERVICE, Infer

DATA, HEADERS, RESET, SETTINGS, PING, GO_AWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8  # RFC 9113, section 6
END_STREAM = ACK = 0x1
END_HEADERS = 0x4
INITIAL_WINDOW = 0x4  # identifier of SETTINGS_INITIAL_WINDOW_SIZE
FRAME_BYTES = 16384  # default of SETTINGS_MAX_FRAME_SIZE
WINDOW, OWN_WINDOW = 65535, 1 << 30


def grpc_request(call: Infer) -> bytes:
    """Return a call's message with gRPC's prefix: flag "not compressed" and length."""
    return struct.pack(">BI", 0, len(call.message)) + call.message


class GrpcWire:
    """Connection that calls ModelInfer, one call at a time."""

    def __init__(self, port: int) -> None:
        self.sock = connect(port)
        self._head = _header_block(SERVICE + Infer.rpc, f"127.0.0.1:{port}")
        self._buffer, self._stream, self._response_bytes = bytearray(), -1, 0
        self._window, self._stream_window, self._initial = WINDOW, 0, WINDOW
        self._unsent = memoryview(b"")  # part of the request that flow control holds back
        settings = struct.pack(">HI", INITIAL_WINDOW, OWN_WINDOW)
        opening = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(SETTINGS, 0, 0, settings)
        send_all(self.sock, opening + _frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", OWN_WINDOW)))

    def send(self, request: bytes) -> None:
        self._stream += 2
        self._response_bytes, self._unsent, self._stream_window = 0, memoryview(request), self._initial
        self._pump(_frame(HEADERS, END_HEADERS, self._stream, self._head))

    def receive(self) -> bool:
        data = self.sock.recv(READ)
        if not data:
            raise LoadError("the server closed a connection")
        self._buffer += data
        offset, done, reply = 0, False, b""
        while len(self._buffer) >= offset + 9:
            size = int.from_bytes(self._buffer[offset : offset + 3], "big")
            if len(self._buffer) < offset + 9 + size:
                break
            kind, flags = self._buffer[offset + 3], self._buffer[offset + 4]
            stream = int.from_bytes(self._buffer[offset + 5 : offset + 9], "big")
            payload = bytes(self._buffer[offset + 9 : offset + 9 + size])
            offset += 9 + size
            if kind == DATA:
                self._response_bytes += size
                reply += _frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", size)) if size else b""
            elif kind in (RESET, GO_AWAY):
                raise LoadError("the server ended a gRPC call or connection")
            elif kind == HEADERS and flags & END_STREAM:
                done = True
            else:
                reply += self._control(kind, flags, stream, payload)
        del self._buffer[:offset]
        if done and not self._response_bytes:  # trailers only: a status other than OK
            raise LoadError("a gRPC call failed")
        if reply or self._unsent:
            self._pump(reply)
        return done

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        """Handle a frame other than DATA and HEADERS; return the bytes of the reply."""
        if kind == SETTINGS and not flags & ACK:
            for start in range(0, len(payload), 6):
                name, value = struct.unpack_from(">HI", payload, start)
                if name == INITIAL_WINDOW:
                    self._stream_window += value - self._initial
                    self._initial = value
            return _frame(SETTINGS, ACK, 0, b"")
        if kind == WINDOW_UPDATE:
            more = int.from_bytes(payload, "big")
            if stream == 0:
                self._window += more
            elif stream == self._stream:
                self._stream_window += more
        if kind == PING and not flags & ACK:
            return _frame(PING, ACK, 0, payload)
        return b""

    def _pump(self, first: bytes) -> None:
        """Send `first`, and as much of the request as the flow-control windows allow."""
        parts = [first]
        while self._unsent and (size := min(len(self._unsent), self._window, self._stream_window, FRAME_BYTES)) > 0:
            last = END_STREAM if size == len(self._unsent) else 0
            parts.append(_frame(DATA, last, self._stream, self._unsent[:size]))
            self._unsent = self._unsent[size:]
            self._window -= size
            self._stream_window -= size
        send_all(self.sock, b"".join(parts))


def _frame(kind: int, flags: int, stream: int, payload: bytes | memoryview) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _header_block(path: str, authority: str) -> bytes:
    """Encode the header fields of every call with HPACK's static table and literals (RFC 7541)."""

    def text(value: str) -> bytes:
        return bytes([len(value)]) + value.encode()  # below 127 bytes each

    path_and_authority = b"\x04" + text(path) + b"\x01" + text(authority)
    content_type = bytes([0x0F, 0x10]) + text("application/grpc")
    return bytes([0x83, 0x86]) + path_and_authority + content_type + b"\0" + text("te") + text("trailers")  # POST, http

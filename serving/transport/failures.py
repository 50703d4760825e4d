"""Errors between client and server, and how HTTP statuses and gRPC codes become them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from serving.shared.errors import ServingError
from serving.transport.messages import Garbled

REASON_LENGTH = 500
# A gateway or a server that is starting, stopping or full; nothing is wrong with the request.
UNAVAILABLE = (502, 503)
ADVICE = {
    401: "give credentials with --header 'Authorization: ...' (in Python: token= or headers=)",
    403: "this address or these credentials are not allowed to send this request",
    407: "the proxy in between requires credentials",
    413: "send fewer or smaller images in one request",
    429: "send fewer requests, or use fewer clients",
}
UNREACHABLE = ("UNAVAILABLE", "UNKNOWN", "INTERNAL")
TLS_HINT = "give the CA that signed its certificate with --ca-file (in Python: ca_file=)"


class Refused(ServingError):
    """The server refused the request; the message is its reason. A retry would be refused too."""


class Unavailable(ServingError):
    """No server accepts connections, the connection broke, or the server is not ready. A retry is safe.

    pause: seconds of the server's Retry-After, None without one.
    """

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


class DeadlineExceeded(ServingError):
    """The caller's timeout has passed."""


def unreachable(url: str) -> Unavailable:
    """The error where no server accepts connections, or a connection broke."""
    return Unavailable(_absent(url, ""))


def not_triton(url: str, why: str = "") -> ServingError:
    """The error where a response is not Triton's; a retry would not change that."""
    return ServingError(_absent(url, why))


def readable(url: str, read: Callable[..., Any], *response: Any) -> Any:
    """What a call's `read` makes of a response with status 200. Raises ServingError where it is not Triton's."""
    try:
        return read(*response)
    except Garbled as error:
        raise not_triton(url, str(error)) from error


def deadline_exceeded(url: str, budget: float) -> DeadlineExceeded:
    """The error where the deadline of a call has passed; budget: its seconds."""
    return DeadlineExceeded(f"{url} did not answer within {budget:g} s; try again or allow a longer timeout")


def tls_error(url: str, why: object) -> ServingError:
    """The error where TLS fails: an untrusted certificate, a wrong name, no TLS at the other end."""
    return ServingError(f"{url}: no encrypted connection: {_one_line(str(why))}; {TLS_HINT}")


def check_http(url: str, status: int, headers: dict[str, str], body: bytes, budget: float) -> None:
    """Raise the error of an HTTP status other than 200; headers by lower-case name."""
    if status == 200:
        return
    reason = _triton_reason(body)
    if status in UNAVAILABLE:
        raise Unavailable(f"{url} is not available: {reason or f'HTTP {status}'}", _retry_after(headers))
    if status in (408, 499, 504):
        raise deadline_exceeded(url, budget)
    if reason is None and status in ADVICE:
        raise Refused(f"{url} refused: HTTP {status}; {ADVICE[status]}")
    if reason is None and 300 <= status < 400:
        raise Refused(
            f"{url} refused: HTTP {status}, moved to {headers.get('location', 'elsewhere')}; give that address"
        )
    if reason is None:
        raise not_triton(url, f"HTTP {status}")
    raise Refused(f"{url} refused: {reason}")


def from_grpc(url: str, error: Any, budget: float) -> ServingError:
    """The error for a grpc.RpcError, by its status code and details."""
    code, details = error.code().name, _one_line(error.details() or "")
    if code == "DEADLINE_EXCEEDED":
        return deadline_exceeded(url, budget)
    handshake = "handshake" in details.replace("tcp handshaker", "")  # a TCP connection that broke is retried
    if code in UNREACHABLE and (handshake or "CERTIFICATE_VERIFY" in details):
        return tls_error(url, details)
    if code == "UNAVAILABLE" and "restrict" not in details.lower() and "unknown model" not in details.lower():
        return unreachable(url)
    if code in ("UNKNOWN", "UNIMPLEMENTED") or (code == "INTERNAL" and "http2" in details.lower()):
        return not_triton(url)
    if code == "UNAUTHENTICATED":
        return Refused(f"{url} refused: {details or code}; {ADVICE[401]}")
    return Refused(f"{url} refused: {details or code}")


def _absent(url: str, why: str) -> str:
    reason = f" ({why})" if why else ""
    return f"no Triton server answers at {url}{reason}; start one with `tailor serve` or give another --url"


def _triton_reason(body: bytes) -> str | None:
    """The error of Triton's JSON, None when this is not Triton's."""
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        return None
    reason = found.get("error") if isinstance(found, dict) else None
    return _one_line(reason) if isinstance(reason, str) else None


def _retry_after(headers: dict[str, str]) -> float | None:
    """Seconds of a Retry-After header; a date is not read, as clocks differ."""
    value = headers.get("retry-after", "")
    return float(value) if value.isascii() and value.isdigit() else None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:REASON_LENGTH]

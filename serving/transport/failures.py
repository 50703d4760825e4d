"""Error types of the transport, and the conversion of HTTP statuses and gRPC codes into them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from serving.shared.errors import ServingError
from serving.transport.messages import InvalidResponse

REASON_LENGTH = 500
# Statuses of a gateway or server that is starting, stopping or overloaded; the request itself is valid.
UNAVAILABLE = (502, 503)
# Triton's errors where an inference process does not react for a second: it hangs, has exited, or got no processor time on
# a busy machine. Over HTTP their status is 500, over gRPC INTERNAL.
NO_REACTION = ("is not healthy", "health mutex")
ADVICE = {
    401: "give credentials with --header 'Authorization: ...' (in Python: token= or headers=)",
    403: "this address or these credentials are not allowed to send this request",
    407: "the proxy in between requires credentials",
    413: "send fewer or smaller images in one request",
    429: "send fewer requests, or use fewer clients",
}
UNREACHABLE = ("UNAVAILABLE", "UNKNOWN", "INTERNAL")
TLS_HINT = "give the CA that signed its certificate with --ca-file (in Python: ca_file=)"


class RequestRejected(ServingError):
    """The server rejected the request; the message is the server's reason. Not retried."""


class Unavailable(ServingError):
    """No server accepts connections, the connection broke, or the server is not ready. A retry is safe.

    pause: seconds in the server's Retry-After header; None without the header.
    """

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


class ProcessUnhealthy(Unavailable):
    """An inference process did not react for a second. Another one of the model may answer a retry."""


class DeadlineExceeded(ServingError):
    """The deadline of the call has passed."""


def unreachable(url: str) -> Unavailable:
    """Return the error for a server that accepts no connections, or a broken connection."""
    return Unavailable(str(not_triton(url)))


def not_triton(url: str, reason: str = "") -> ServingError:
    """Return the error for a response that is not Triton's; not retried."""
    detail = f" ({reason})" if reason else ""
    return ServingError(
        f"no Triton server answers at {url}{detail}; start one with `tailor serve` or give another --url"
    )


def decode_response(url: str, decode: Callable[..., Any], *response: Any) -> Any:
    """Decode a response of status 200 with the call's `decode`. Raises ServingError where the response is not Triton's."""
    try:
        return decode(*response)
    except InvalidResponse as error:
        raise not_triton(url, str(error)) from error


def unhealthy(url: str, reason: str) -> ProcessUnhealthy:
    """Return the error for an inference process that does not react. reason: Triton's message."""
    return ProcessUnhealthy(f"{url} is not available: {reason} It hangs, has exited, or the machine is overloaded")


def deadline_exceeded(url: str, budget: float) -> DeadlineExceeded:
    """Return the error for a call whose deadline has passed. budget: its timeout in seconds."""
    return DeadlineExceeded(f"{url} did not answer within {budget:g} s; try again or allow a longer timeout")


def tls_error(url: str, reason: object) -> ServingError:
    """Return the error for failed TLS: untrusted certificate, wrong host name, or a server without TLS."""
    return ServingError(f"{url}: no encrypted connection: {_one_line(str(reason))}; {TLS_HINT}")


def check_http_status(url: str, status: int, headers: dict[str, str], body: bytes, budget: float) -> None:
    """Raise the error for an HTTP status other than 200. headers: by lower-case name."""
    if status == 200:
        return
    reason = _triton_reason(body)
    if status == 500 and reason and any(text in reason for text in NO_REACTION):
        raise unhealthy(url, reason)
    if status in UNAVAILABLE:
        raise Unavailable(f"{url} is not available: {reason or f'HTTP {status}'}", _retry_after(headers))
    if status in (408, 499, 504):
        raise deadline_exceeded(url, budget)
    if reason is None and status in ADVICE:
        raise RequestRejected(f"{url} refused: HTTP {status}; {ADVICE[status]}")
    if reason is None and 300 <= status < 400:
        raise RequestRejected(
            f"{url} refused: HTTP {status}, moved to {headers.get('location', 'elsewhere')}; give that address"
        )
    if reason is None:
        raise not_triton(url, f"HTTP {status}")
    raise RequestRejected(f"{url} refused: {reason}")


def grpc_error(url: str, error: Any, budget: float) -> ServingError:
    """Return the error for a grpc.RpcError, by its status code and details."""
    code, details = error.code().name, _one_line(error.details() or "")
    if code == "DEADLINE_EXCEEDED":
        return deadline_exceeded(url, budget)
    if code == "INTERNAL" and any(text in details for text in NO_REACTION):
        return unhealthy(url, details)
    handshake = "handshake" in details.replace("tcp handshaker", "")  # "tcp handshaker": a broken connection, not TLS
    if code in UNREACHABLE and (handshake or "CERTIFICATE_VERIFY" in details):
        return tls_error(url, details)
    if code == "UNAVAILABLE" and "restrict" not in details.lower() and "unknown model" not in details.lower():
        return unreachable(url)
    if code in ("UNKNOWN", "UNIMPLEMENTED") or (code == "INTERNAL" and "http2" in details.lower()):
        return not_triton(url)
    if code == "UNAUTHENTICATED":
        return RequestRejected(f"{url} refused: {details or code}; {ADVICE[401]}")
    return RequestRejected(f"{url} refused: {details or code}")


def _triton_reason(body: bytes) -> str | None:
    """Return the error message in Triton's JSON body; None for a body of another form."""
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        return None
    reason = content.get("error") if isinstance(content, dict) else None
    return _one_line(reason) if isinstance(reason, str) else None


def _retry_after(headers: dict[str, str]) -> float | None:
    """Return the seconds of a Retry-After header; None for a date, since the clocks of two machines differ."""
    value = headers.get("retry-after", "")
    return float(value) if value.isascii() and value.isdigit() else None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:REASON_LENGTH]

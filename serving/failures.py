"""What can go wrong between client and server, and what it means: one reading of HTTP and gRPC for every client."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from serving.calls import Garbled
from serving.errors import ServingError

REASON_LENGTH = 500
# A gateway or a server that is starting, stopping or full; nothing is wrong with the request.
UNAVAILABLE = (502, 503)
ADVICE = {
    401: "give credentials with --header 'Authorization: ...' (in Python: token= or headers=)",
    403: "this address or these credentials may not ask that",
    407: "the proxy in between wants credentials",
    413: "send fewer or smaller images in one request",
    429: "ask less often, or from fewer clients",
}
UNREACHABLE = ("UNAVAILABLE", "UNKNOWN", "INTERNAL")
TLS_HINT = "give the CA that signed its certificate with --ca-file (in Python: ca_file=)"


class Refused(ServingError):
    """The server answered, and said no; the message is its reason. Asking again would bring the same answer."""


class Unavailable(ServingError):
    """No server is there, it went away, or it is not ready. Asking again is safe: no request of ours changes anything.

    pause: seconds after which the server itself asked to be tried again, None when it did not say.
    """

    def __init__(self, message: str, pause: float | None = None) -> None:
        super().__init__(message)
        self.pause = pause


class DeadlineExceeded(ServingError):
    """The time that the caller allowed ran out."""


def nobody(url: str, why: str = "") -> Unavailable:
    """No server accepts connections, or it cut one off."""
    return Unavailable(_absent(url, why))


def foreign(url: str, why: str = "") -> ServingError:
    """Something answers that is not Triton; asking again would not change that."""
    return ServingError(_absent(url, why))


def readable(url: str, read: Callable[..., Any], *response: Any) -> Any:
    """What a call's `read` makes of a response with status 200. Raises ServingError where it is not Triton's."""
    try:
        return read(*response)
    except Garbled as error:
        raise foreign(url, str(error)) from error


def late(url: str, budget: float) -> DeadlineExceeded:
    """The deadline of a call has passed; budget: the seconds it had."""
    return DeadlineExceeded(f"{url} did not answer within {budget:g} s; try again or allow a longer timeout")


def untrusted(url: str, why: object) -> ServingError:
    """TLS could not be set up: a certificate that is not trusted, a wrong name, no TLS at the other end."""
    return ServingError(f"{url}: no encrypted connection: {_one_line(str(why))}; {TLS_HINT}")


def check_http(url: str, status: int, headers: dict[str, str], body: bytes, budget: float) -> None:
    """Raise what an HTTP answer other than 200 means; headers by lower-case name. 200 passes."""
    if status == 200:
        return
    reason = _triton_reason(body)
    if status in UNAVAILABLE:
        raise Unavailable(f"{url} is not available: {reason or f'HTTP {status}'}", _retry_after(headers))
    if status in (408, 499, 504):
        raise late(url, budget)
    if reason is None and status in ADVICE:
        raise Refused(f"{url} refused: HTTP {status}; {ADVICE[status]}")
    if reason is None and 300 <= status < 400:
        raise Refused(
            f"{url} refused: HTTP {status}, moved to {headers.get('location', 'elsewhere')}; give that address"
        )
    if reason is None:
        raise foreign(url, f"HTTP {status}")
    raise Refused(f"{url} refused: {reason}")


def from_grpc(url: str, error: Any, budget: float) -> ServingError:
    """What a grpc.RpcError means, from its status code and details."""
    code, details = error.code().name, _one_line(error.details() or "")
    if code == "DEADLINE_EXCEEDED":
        return late(url, budget)
    if code in UNREACHABLE and ("handshake" in details or "CERTIFICATE_VERIFY" in details):
        return untrusted(url, details)
    if code == "UNAVAILABLE" and "restrict" not in details.lower() and "unknown model" not in details.lower():
        return nobody(url)
    if code in ("UNKNOWN", "UNIMPLEMENTED") or (code == "INTERNAL" and "http2" in details.lower()):
        return foreign(url)
    if code == "UNAUTHENTICATED":
        return Refused(f"{url} refused: {details or code}; {ADVICE[401]}")
    return Refused(f"{url} refused: {details or code}")


def _absent(url: str, why: str) -> str:
    told = f" ({why})" if why else ""
    return f"no Triton server answers at {url}{told}; start one with `tailor serve` or give another --url"


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

"""Whether a Triton server with Tailor's models answers an image: exit status 0 or 1. The standard library alone.

Triton's own ready endpoints stay well when a stub has died, so containers ask this: `[--live] [URL [METRICS_URL]]`.
With --live it asks whether the server is worth keeping: one that is only too busy to answer in time is. It is well then
if it answered others meanwhile, or, where its metrics are not to be had, if Triton itself says that it lives.
"""

from __future__ import annotations

import http.client
import json
import re
import struct
import sys
import urllib.error
import urllib.request
import zlib

TIMEOUT = 8.0  # seconds
# Straight to the server: a proxy of the environment would refuse loopback, and Kubernetes would end a healthy pod.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
LIVE_TIMEOUT = 30.0  # seconds; a server that answers nobody for that long, three times in a row, hangs
SHORT_TIMEOUT = 5.0  # seconds, for what no model has to answer


def grey_png(side: int = 16) -> bytes:
    """A small grey picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\x80" * side) * side
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def answered(metrics_url: str) -> float | None:
    """How many requests Triton counts as answered by the classifier; None where it does not say."""
    try:
        with DIRECT.open(metrics_url, timeout=SHORT_TIMEOUT) as answer:
            shown = answer.read().decode()
    except (OSError, http.client.HTTPException):
        return None
    counted = re.findall(r'^nv_inference_request_success\{.*model="classifier".*\} (\S+)$', shown, re.MULTILINE)
    return sum(map(float, counted)) if counted else None


def lives(url: str) -> bool:
    """What Triton says of itself."""
    try:
        with DIRECT.open(f"{url}/v2/health/live", timeout=SHORT_TIMEOUT):
            return True
    except (OSError, http.client.HTTPException):
        return False


def ask(url: str, timeout: float) -> None:
    """Ask the classifier about an image. Raises OSError, of which TimeoutError says that time ran out."""
    image = struct.pack("<I", len(grey_png())) + grey_png()
    strength = struct.pack("<f", 0.0)
    inputs = [
        {"name": "image", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(image)}},
        {"name": "strength", "shape": [1, 1], "datatype": "FP32", "parameters": {"binary_data_size": len(strength)}},
    ]
    head = json.dumps({"inputs": inputs}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    asked = urllib.request.Request(f"{url}/v2/models/classifier/infer", head + image + strength, headers)
    try:
        with DIRECT.open(asked, timeout=timeout) as answer:
            answer.read()
    except http.client.HTTPException as error:
        raise ConnectionError(f"cut off: {error!r}") from None
    except urllib.error.URLError as error:
        raise error.reason if isinstance(error.reason, TimeoutError) else error from None


def main(*arguments: str) -> int:
    """Ask once; says why on stderr when there is no answer."""
    live, addresses = "--live" in arguments, [given for given in arguments if given != "--live"]
    url, metrics_url = (*addresses, *("http://127.0.0.1:8000", "http://127.0.0.1:8002/metrics")[len(addresses) :])
    before = answered(metrics_url) if live else None
    try:
        ask(url, LIVE_TIMEOUT if live else TIMEOUT)
        return 0
    except OSError as error:
        print(f"classifier at {url} does not answer: {error}", file=sys.stderr)
        if not live or not isinstance(error, TimeoutError):
            return 1
    after = answered(metrics_url)
    busy = lives(url) if before is None or after is None else after > before
    print("it is busy" if busy else "nor does it answer others", file=sys.stderr)
    return 0 if busy else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

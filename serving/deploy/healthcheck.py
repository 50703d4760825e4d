"""Health check of a container: exit status 0 if `classifier` or `segmenter` answers a request with one image, else 1.

Arguments: `[--live] [URL [METRICS_URL]]`. Needs only the standard library. Triton's ready endpoints return 200 after an
inference process has died, so the probes run this program. With --live (liveness probe) a server that is only
overloaded passes too: after a timeout the exit status is 0 if the server answered other requests meanwhile, or, if its
metrics are not available, if Triton's live endpoint returns 200.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import struct
import sys
import urllib.error
import urllib.request
import zlib
from pathlib import Path

TIMEOUT = 8.0  # seconds
# Without a proxy of the environment, which would reject loopback; Kubernetes would then restart a healthy pod.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
LIVE_TIMEOUT = 30.0  # seconds; a server that answers no request for that long, three times in a row, hangs
SHORT_TIMEOUT = 5.0  # seconds, for metrics and health endpoints, which need no model


def image_model() -> str:
    """The model that takes images, as in entrypoint.sh: `segmenter` where the repository has it, otherwise `classifier`."""
    repository = Path(os.environ.get("TAILOR_REPOSITORY", "/models"))
    return "segmenter" if (repository / "segmenter").is_dir() else "classifier"


def grey_png(side: int = 16) -> bytes:
    """A grey PNG image of side * side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\x80" * side) * side
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def answered_requests(metrics_url: str) -> float | None:
    """Number of requests that the model has answered, from Triton's metrics; None if not available."""
    try:
        with DIRECT.open(metrics_url, timeout=SHORT_TIMEOUT) as answer:
            metrics = answer.read().decode()
    except (OSError, http.client.HTTPException):
        return None
    counts = re.findall(
        rf'^nv_inference_request_success\{{.*model="{image_model()}".*\}} (\S+)$', metrics, re.MULTILINE
    )
    return sum(map(float, counts)) if counts else None


def is_live(url: str) -> bool:
    """Whether Triton's live endpoint returns 200."""
    try:
        with DIRECT.open(f"{url}/v2/health/live", timeout=SHORT_TIMEOUT):
            return True
    except (OSError, http.client.HTTPException):
        return False


def classify_grey_image(url: str, timeout: float) -> None:
    """Send the model a request with one image. Raises OSError if it fails, TimeoutError after `timeout` s."""
    image = struct.pack("<I", len(grey_png())) + grey_png()
    strength = struct.pack("<f", 0.0)
    inputs = [
        {"name": "image", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": len(image)}},
        {"name": "strength", "shape": [1, 1], "datatype": "FP32", "parameters": {"binary_data_size": len(strength)}},
    ]
    head = json.dumps({"inputs": inputs}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    request = urllib.request.Request(f"{url}/v2/models/{image_model()}/infer", head + image + strength, headers)
    try:
        with DIRECT.open(request, timeout=timeout) as answer:
            answer.read()
    except http.client.HTTPException as error:
        raise ConnectionError(f"cut off: {error!r}") from None
    except urllib.error.URLError as error:
        raise error.reason if isinstance(error.reason, TimeoutError) else error from None


def main(*arguments: str) -> int:
    """Send one request; prints the reason of a failure on stderr. Returns the exit status."""
    live, addresses = "--live" in arguments, [argument for argument in arguments if argument != "--live"]
    url, metrics_url = (*addresses, *("http://127.0.0.1:8000", "http://127.0.0.1:8002/metrics")[len(addresses) :])
    before = answered_requests(metrics_url) if live else None
    try:
        classify_grey_image(url, LIVE_TIMEOUT if live else TIMEOUT)
        return 0
    except OSError as error:
        print(f"{image_model()} at {url} does not respond: {error}", file=sys.stderr)
        if not live or not isinstance(error, TimeoutError):
            return 1
    after = answered_requests(metrics_url)
    busy = is_live(url) if before is None or after is None else after > before
    print("it is busy with other requests" if busy else "it answers no other requests either", file=sys.stderr)
    return 0 if busy else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

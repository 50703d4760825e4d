"""Whether a Triton server with Tailor's models answers an image: exit status 0 or 1. The standard library alone.

Triton's own ready endpoints stay well when a stub has died, so containers ask this. Give another address as argument.
"""

from __future__ import annotations

import json
import struct
import sys
import urllib.error
import urllib.request
import zlib

TIMEOUT = 8.0  # seconds


def grey_png(side: int = 16) -> bytes:
    """A small grey picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\x80" * side) * side
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def main(url: str = "http://127.0.0.1:8000") -> int:
    """Ask once; says why on stderr when there is no answer."""
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
        with urllib.request.urlopen(asked, timeout=TIMEOUT) as answer:
            answer.read()
            return 0
    except (OSError, urllib.error.URLError) as error:
        print(f"classifier at {url} does not answer: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))

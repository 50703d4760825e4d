"""Example requests for a shell: `curl` commands that send an image file to the classifier, as bytes or in JSON."""

from __future__ import annotations

import shlex
from pathlib import Path

CURL = """\
image={image}
bytes=$(wc -c < "$image")
json='{{"inputs": [{{"name": "image", "shape": [1, 1], "datatype": "BYTES",
    "parameters": {{"binary_data_size": '$((bytes + 4))'}}}},
  {{"name": "strength", "shape": [1, 1], "datatype": "FP32", "data": [{strength:g}]}}]}}'
{{ printf %s "$json"
  printf "$(printf '\\\\%03o' $((bytes & 255)) $((bytes >> 8 & 255)) $((bytes >> 16 & 255)) $((bytes >> 24 & 255)))"
  cat "$image"; }} | curl --silent --show-error --data-binary @- \\
  --header "Inference-Header-Content-Length: ${{#json}}" {url}/v2/models/classifier/infer"""

JSON = """\
{{ printf '{{"inputs": [{{"name": "image", "shape": [1, 1], "datatype": "BYTES", "data": ["data:image/png;base64,'; \\
  base64 < {image} | tr -d '\\n'; \\
  printf '"]}}, {{"name": "prior", "shape": [1, 1], "datatype": "BYTES", "data": ["balanced"]}}]}}'; }} > request.json
curl -d @request.json {url}/v2/models/classifier/infer"""


def curl_example(url: str, image: Path, strength: float = 0.0) -> str:
    """Return POSIX shell commands that classify an image file at a strength over HTTP.

    Triton's binary form: a JSON header, then each image after its length as four bytes, little-endian. Only the
    server's limit on images applies; the gateway limits JSON to 1 MiB.
    """
    return CURL.format(image=shlex.quote(str(image)), strength=strength, url=url)


def json_example(url: str, image: Path) -> str:
    """Return POSIX shell commands that write request.json with the image as base64 text, and send it.

    The classifier detects the image format from the bytes: `image/png` also works for a JPEG or WebP file.
    """
    return JSON.format(image=shlex.quote(str(image)), url=url)

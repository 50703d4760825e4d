"""Requests to paste into a shell: `curl` sends an image file to the classifier, as bytes or within JSON."""

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
    """Shell commands that classify an image file at a strength over HTTP; they run in any POSIX shell.

    Triton's binary form: a JSON header, then each image after its length in four bytes, lowest first. It has no limit on
    the image but the server's own, where the gateway takes 1 MiB of JSON.
    """
    return CURL.format(image=shlex.quote(str(image)), strength=strength, url=url)


def json_example(url: str, image: Path) -> str:
    """Shell commands that write request.json with the image as base64 text, and send it; they run in any POSIX shell.

    The classifier finds out itself which kind of image it is: `image/png` may stay for a JPEG or WebP file.
    """
    return JSON.format(image=shlex.quote(str(image)), url=url)

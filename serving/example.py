"""A request that can be typed: `curl` asking the classifier about an image file."""

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


def curl_example(url: str, image: Path, strength: float = 0.0) -> str:
    """Shell commands that classify an image file at a strength over HTTP; they run in any POSIX shell.

    Triton takes bytes in its binary protocol alone: a JSON header, then each image after its length in four bytes,
    lowest first.
    """
    return CURL.format(image=shlex.quote(str(image)), strength=strength, url=url)

"""Whether the graph beside a model is the one that its manifest names; asked of both models before they load.

Triton's own onnxruntime backend runs any file that it finds, so in a container `classifier` looks at what `student` has.
"""

from __future__ import annotations

import hashlib

import triton_python_backend_utils as pb_utils


def check_graph(path, manifest):
    """Compare the sha256 of a model.onnx, `path`, with the one in the manifest, a mapping.

    Raises TritonModelException in one line, which fails the load.
    """
    name = "/".join(path.parts[-3:])
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise pb_utils.TritonModelException(f"{name}: {error.strerror}; write the version again") from None
    found, expected = digest.hexdigest(), manifest["files"]["student.onnx"]
    if found != expected:
        raise pb_utils.TritonModelException(
            f"{name}: sha256 is {found[:12]}..., manifest.json says {expected[:12]}...; write the version again"
        )

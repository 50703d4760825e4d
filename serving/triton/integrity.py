"""Check that the graph (model.onnx) is the one in the manifest, by sha256; both models run the check when they load.

`classifier` checks the file of `student` too, because in a container Triton's onnxruntime backend runs it unchecked.
"""

from __future__ import annotations

import hashlib

import triton_python_backend_utils as pb_utils


def check_graph(path, manifest):
    """Compare the sha256 of the model.onnx at `path` with the one in `manifest`, a mapping.

    Raises TritonModelException in one line if they differ or the file cannot be read; the load then fails.
    """
    name = "/".join(path.parts[-3:])
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise pb_utils.TritonModelException(f"{name}: {error.strerror}; write the version again") from None
    actual, expected = digest.hexdigest(), manifest["files"]["student.onnx"]
    if actual != expected:
        raise pb_utils.TritonModelException(
            f"{name}: sha256 is {actual[:12]}..., manifest.json has {expected[:12]}...; write the version again"
        )

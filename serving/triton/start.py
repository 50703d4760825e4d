"""Start of an inference process (Triton's stub): check of its graph, lower priority until it is ready, first-call costs.

Why: a start takes 0.5 s of CPU time, most of it in imports (Python, numpy), and would delay every request on the
machine. The launcher (serving/shared/priority.py) starts the process at lower priority, if it can be raised again, and
sets TAILOR_NICENESS to the niceness of the server. `classifier` checks the graph of `student` too, because in a container
Triton's onnxruntime backend runs it unchecked.
"""

from __future__ import annotations

import asyncio  # noqa: F401 (else Triton's stub imports it at its first response, which takes 15 ms)
import hashlib
import io
import os
from pathlib import Path

import numpy as np

VARIABLE = "TAILOR_NICENESS"
FORMATS = ("JPEG", "PNG", "WEBP")


def apply_priority():
    """Raise the priority of every thread of this process to the server's. `initialize` calls it last.

    Raises OSError if it is not permitted: the load then fails, instead of a model serving at lower priority.
    """
    niceness = os.environ.get(VARIABLE)
    if niceness is not None:
        for task in Path("/proc/self/task").iterdir():
            os.setpriority(os.PRIO_PROCESS, int(task.name), int(niceness))


def decode_each_format(preprocess, size, resize_to):
    """Decode and resize an image of every format: the first image of a format makes Pillow load its plug-in.

    preprocess: the module of that name beside this one. size, resize_to: as in the manifest, pixels.
    """
    from PIL import Image, WebPImagePlugin  # noqa: F401 (else Pillow imports forty other plug-ins to find it)

    pixels = np.zeros((resize_to + 1, resize_to + 1, 3), dtype=np.uint8)
    for image_format in FORMATS:
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, image_format)
        preprocess.preprocess(encoded.getvalue(), size, resize_to)


def check_graph(path, manifest):
    """Compare the sha256 of the model.onnx at `path` with the one in `manifest`, a mapping.

    Raises TritonModelException in one line if they differ or the file cannot be read; the load then fails.
    """
    import triton_python_backend_utils as pb_utils  # exists only inside Triton

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

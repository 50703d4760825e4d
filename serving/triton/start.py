"""Start of an inference process (Triton's stub): lower priority until it is ready, first-call costs before it serves.

Why: a start takes 0.5 s of CPU time, most of it in imports (Python, numpy), and would delay every request on the
machine. The launcher (serving/shared/priority.py) starts the process at lower priority, if it can be raised again, and
sets TAILOR_NICENESS to the niceness of the server.
"""

from __future__ import annotations

import asyncio  # noqa: F401 (else Triton's stub imports it at its first response, which takes 15 ms)
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

"""The start of a stub: it stands back for those who are answered meanwhile, and pays its first-call costs before it serves.

Half a second's work, most of it before the model's own code (Python, numpy), would otherwise take turns with every
request on the machine. The launcher starts a stub at a lower priority where it may be raised again, and says in
TAILOR_NICENESS what it shall be raised to.
"""

from __future__ import annotations

import asyncio  # noqa: F401 (Triton's stub imports it at its first answer, which would take 15 ms more)
import io
import os
from pathlib import Path

import numpy as np

VARIABLE = "TAILOR_NICENESS"
FORMATS = ("JPEG", "PNG", "WEBP")


def take_up():
    """Give every thread of this process the priority that the server has. The last thing that `initialize` does.

    Raises OSError where it is not allowed, so that a model that would answer slowly does not load.
    """
    niceness = os.environ.get(VARIABLE)
    if niceness is not None:
        for task in Path("/proc/self/task").iterdir():
            os.setpriority(os.PRIO_PROCESS, int(task.name), int(niceness))


def decode_each_format(preprocess, size, resize_to):
    """Decode and resize a picture of every format: Pillow loads its plug-ins at the first one.

    preprocess: the module of that name beside this one.
    """
    from PIL import Image, WebPImagePlugin  # noqa: F401 (looked for among forty other plug-ins unless it is there)

    pixels = np.zeros((resize_to + 1, resize_to + 1, 3), dtype=np.uint8)
    for form in FORMATS:
        encoded = io.BytesIO()
        Image.fromarray(pixels).save(encoded, form)
        preprocess.preprocess(encoded.getvalue(), size, resize_to)

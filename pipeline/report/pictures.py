"""Images small enough to lie inside a page."""

from __future__ import annotations

import base64
import io

from PIL import Image

from models.preprocess import decode

SIDE = 96  # pixels of the longer side, at most


def thumbnail(data: bytes) -> str:
    """A data URI of an encoded image, at most SIDE pixels wide and high: a few kilobytes, whatever came in.

    Decoded and encoded anew, so that nothing of the file but its pixels gets into the page. Raises ImageError as
    `models.preprocess.decode` does.
    """
    image = decode(data)
    times = SIDE // max(image.size)
    exact = times > 1
    if exact:  # a small image's pixels are shown as they are, whatever a browser makes of small images
        image = image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    else:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "WEBP", lossless=exact, quality=100 if exact else 72, method=4)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"

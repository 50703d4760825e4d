"""Pictures of class maps: a palette, the class map over its image, and data URIs for the report."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from models.label_map_image import palette
from pipeline.sources import UNLABELLED

SIDE = 320  # pixels of the longer side of a picture in the report, at most
OPACITY = 0.55


def overlay(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The image uint8 [h,w,3] with the colours of its class map uint8 [h,w] over it; pixels without a class are unchanged."""
    colours = np.array(palette(), dtype=np.float64).reshape(256, 3)[labels]
    mixed = (1 - OPACITY) * image + OPACITY * colours
    return np.where((labels == UNLABELLED)[..., None], image, mixed.round()).astype(np.uint8)


def data_uri(pixels: np.ndarray) -> str:
    """Data URI of a picture uint8 [h,w,3], at most SIDE pixels wide and high."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=80, method=4)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


def colour_text(index: int) -> str:
    """The palette's colour of a class as #rrggbb."""
    red, green, blue = palette()[3 * index : 3 * index + 3]
    return f"#{red:02x}{green:02x}{blue:02x}"

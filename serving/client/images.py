"""Convert input images (files, bytes, Pillow images, numpy arrays) to the encoded bytes of a request."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.image_names import FOLDER_LINK, SUFFIXES, has_image_suffix, is_passed_over
from models.preprocess import MAX_BYTES, ImageError, check_size, decode, opened, to_rgb, upright
from serving.shared.errors import InputError

ImageLike = bytes | bytearray | memoryview | str | Path | Image.Image | NDArray[np.uint8]

SINGLE = (bytes, bytearray, memoryview, str, os.PathLike, Image.Image)
# Fastest PNG compression level: the bytes are used for one request only.
PNG_LEVEL = 1
ARRAY_HINT = "expected uint8 [H,W,3] or [H,W]"


def encode_images(images: Sequence[ImageLike], check: bool = True) -> list[bytes]:
    """Return the encoded bytes of every image, in order. Raises InputError naming the file or the image's index from 0.

    images: a list, or an array [N,H,W,3]. check: decode files and bytes before the request, as the server will.
    """
    return [read_image(image, index, check) for index, image in enumerate(check_list(images))]


def check_list(images: Iterable[ImageLike]) -> Iterable[ImageLike]:
    """Return `images` unchanged. Raises InputError for a single image: str and bytes would pass as sequences."""
    if isinstance(images, SINGLE) or (isinstance(images, np.ndarray) and images.ndim != 4):
        raise InputError("images is a single image; give a list of images: predict([image])")
    if not isinstance(images, Iterable):
        raise InputError(f"images is {type(images).__name__}; expected a list of files, bytes, Pillow images or arrays")
    return images


def read_image(image: ImageLike, index: int = 0, check: bool = True) -> bytes:
    """Return the encoded bytes of one image.

    A file (str, Path) and bytes are sent unchanged; a Pillow image or a numpy array (uint8 [H,W,3] RGB or [H,W] grey)
    is encoded as PNG (lossless). Raises InputError naming the file (or the image's index) and the problem: missing, a
    folder, too large, not a JPEG, PNG or WebP image, damaged, too many pixels. The file size is checked before the file
    is read. check=False skips decoding here, so that the server detects a damaged image.
    """
    name = f"image {index}"
    try:
        if isinstance(image, Image.Image):
            return _png(to_rgb(upright(image)))
        if isinstance(image, np.ndarray):
            return _png(_from_array(image))
        if isinstance(image, bytes | bytearray | memoryview):
            data = bytes(image)
        elif isinstance(image, str | os.PathLike):
            name, data = str(image), _read_file(Path(image))
        else:
            raise ImageError(
                "type", f"is {type(image).__name__}; expected a file, bytes, a Pillow image or a numpy array"
            )
        if check:
            decode(data)
        elif not 0 < len(data) <= MAX_BYTES:
            raise ImageError("bytes", f"has {len(data)} bytes; expected 1 to {MAX_BYTES}")
    except ImageError as error:
        raise InputError(f"{name}: {error}") from None
    return data


def image_files(folder: Path) -> list[Path]:
    """List the JPEG, PNG and WebP files (by suffix) in a folder, recursive and sorted. Raises InputError if none.

    As in training, a link to a folder is read directly in `folder`, as a class, and refused deeper.
    """
    paths = list(folder.rglob("*"))
    paths += [inner for path in paths if path.parent == folder and _is_folder_link(path) for inner in path.rglob("*")]
    paths = [path for path in sorted(paths) if not is_passed_over(path.relative_to(folder))]
    if link := next((path for path in paths if path.parent != folder and _is_folder_link(path)), None):
        raise InputError(f"{link}: {FOLDER_LINK}")
    files = [path for path in paths if has_image_suffix(path) and path.is_file()]
    if not files:
        raise InputError(f"{folder}: holds no image; expected files that end in {', '.join(SUFFIXES)}")
    return files


def _is_folder_link(path: Path) -> bool:
    return path.is_symlink() and path.is_dir()


def header_pixels(data: bytes) -> int:
    """Return the pixel count in an encoded image's header; 0 for an image that the server will reject."""
    try:
        with opened(data) as image:
            return image.width * image.height
    except ImageError:
        return 0


def blank_image() -> bytes:
    """Return a small grey PNG for a health check of the classifier."""
    return _png(Image.new("RGB", (32, 32), (128, 128, 128)))


def _from_array(array: NDArray[Any]) -> Image.Image:
    array_type = f"is {array.dtype} {list(array.shape)}"
    if array.dtype != np.uint8:
        raise ImageError("array", f"{array_type}; {ARRAY_HINT}, with pixels from 0 to 255")
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        raise ImageError("array", f"{array_type}; {ARRAY_HINT}: transpose(1, 2, 0) moves the channels to the end")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise ImageError("array", f"{array_type}; {ARRAY_HINT}")
    return Image.fromarray(np.ascontiguousarray(array))


def _png(image: Image.Image) -> bytes:
    check_size(*image.size)
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=PNG_LEVEL)
    if stream.tell() > MAX_BYTES:
        raise ImageError("bytes", f"has {stream.tell()} bytes as PNG, above the limit of {MAX_BYTES}; make it smaller")
    return stream.getvalue()


def _read_file(path: Path) -> bytes:
    hint = "give a JPEG, PNG or WebP file"
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: is {'a folder' if path.is_dir() else 'not a regular file'}; {hint}")
        if status.st_size > MAX_BYTES:
            raise InputError(f"{path}: has {status.st_size} bytes, above the limit of {MAX_BYTES}")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else os.strerror(22)
        raise InputError(f"{path}: {reason}; {hint}") from None

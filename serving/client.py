"""The client: images and a prior in, typed predictions out."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image

from models.preprocess import MAX_BYTES, ImageError, decode
from serving.errors import InputError, ServingError
from serving.model_config import CLASSIFIER, STUDENT
from serving.priors import Prior, parse_prior, vector_of
from serving.transport import Refused, Transport

DEFAULT_URLS = {"http": "http://127.0.0.1:8000", "grpc": "grpc://127.0.0.1:8001"}
# Bytes of images in one request; recent Triton servers refuse HTTP bodies above 64 MB.
REQUEST_BYTES = 48 * 1024 * 1024


@dataclass(frozen=True)
class Prediction:
    """The answer for one image: the best classes by name and index, their probabilities, the version that gave it."""

    classes: tuple[str, ...]
    indexes: tuple[int, ...]
    probabilities: tuple[float, ...]
    version: int


@dataclass(frozen=True)
class ModelStatus:
    """A model as the server sees it: the versions that it serves, none when it is not loaded."""

    name: str
    versions: tuple[int, ...]


@dataclass(frozen=True)
class Status:
    """A server's state. `answers`: whether the classifier answered an image just now; ready endpoints alone can lie."""

    url: str
    server: str
    server_version: str
    models: tuple[ModelStatus, ...]
    answers: bool
    problem: str | None


class Client:
    """Asks a Tailor server over HTTP or gRPC. A context manager; not for use by several threads at a time.

    url: http://host:port or grpc://host:port (also https, grpcs). timeout: seconds that one request may take.
    """

    def __init__(self, url: str = DEFAULT_URLS["http"], timeout: float = 60.0) -> None:
        if not timeout > 0:
            raise InputError(f"timeout is {timeout}; expected seconds above 0")
        self._transport = Transport(url, timeout)
        self._limits: tuple[int, float | None] | None = None
        self._names: list[str] | None = None

    @property
    def url(self) -> str:
        """The server's address."""
        return self._transport.url

    def predict(
        self, images: Sequence[bytes | str | Path], prior: Prior = None, *, version: int | None = None
    ) -> list[Prediction]:
        """Classify images, each given as encoded bytes or as a file, under one prior; one Prediction each, in order.

        prior: `balanced`, `train`, a strength, a target prior as vector, mapping or file; None is the server's default.
        version: the release to ask; None is the newest. Every image is checked here before anything is sent. Raises
        InputError naming the image or the prior, and ServingError when the server is absent or refuses.
        """
        parsed = parse_prior(prior)
        encoded = [read_image(image, place) for place, image in enumerate(images)]
        if not encoded:
            return []
        rows, default = self._server_limits()
        name, row = self._prior_input(default if parsed is None else parsed)
        predictions: list[Prediction] = []
        for chunk in _chunks(encoded, rows):
            inputs = {"image": np.array(chunk, dtype=np.object_).reshape(-1, 1)}
            if row is not None:
                inputs[name] = np.repeat(row[None], len(chunk), axis=0)
            predictions += self._ask(inputs, "" if version is None else str(version))
        return predictions

    def class_names(self) -> list[str]:
        """The server's class names by index, from the labels of `student`; asked once."""
        if self._names is None:
            shapes = {tensor["name"]: tensor["shape"] for tensor in self._transport.model_metadata(STUDENT)["inputs"]}
            image = np.full([1, *(int(side) for side in shapes["image"][1:])], 128, dtype=np.uint8)
            inputs = {"image": image, "strength": np.zeros((1, 1), dtype=np.float32)}
            answered, _ = self._transport.infer(STUDENT, inputs, {"logits": self._class_count()})
            labelled = [text.decode().split(":", 2) for text in answered["logits"].reshape(-1)]
            if any(len(parts) != 3 for parts in labelled):
                raise ServingError(f"{self.url}: student has no class labels; give the prior as a list, not by name")
            self._names = [name for _, _, name in sorted(labelled, key=lambda parts: int(parts[1]))]
        return self._names

    def status(self) -> Status:
        """The server's and the models' state and versions. Raises ServingError when no server answers."""
        server = self._transport.server_metadata()
        models = []
        for name in (STUDENT, CLASSIFIER):
            try:
                versions = self._transport.model_metadata(name).get("versions", [])
            except Refused:
                versions = []
            models.append(ModelStatus(name, tuple(sorted(int(version) for version in versions))))
        problem = None
        try:
            self.predict([_blank_image()])
        except ServingError as error:
            problem = str(error)
        return Status(self.url, server["name"], server["version"], tuple(models), problem is None, problem)

    def close(self) -> None:
        """Close the connection."""
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, inputs: dict[str, np.ndarray], version: str) -> list[Prediction]:
        answered, by = self._transport.infer(CLASSIFIER, inputs, {"class": 0, "index": 0, "probability": 0}, version)
        return [
            Prediction(
                tuple(name.decode() for name in names),
                tuple(int(index) for index in indexes),
                tuple(float(probability) for probability in probabilities),
                by,
            )
            for names, indexes, probabilities in zip(
                answered["class"], answered["index"], answered["probability"], strict=True
            )
        ]

    def _server_limits(self) -> tuple[int, float | None]:
        """Most rows in a request, and the default strength; one row and none where the server restricts its configs."""
        if self._limits is None:
            try:
                config = self._transport.model_config(CLASSIFIER)
            except Refused:
                self._limits = (1, None)
            else:
                default = config.get("parameters", {}).get("default_strength", {}).get("string_value")
                self._limits = (
                    max(1, int(config.get("max_batch_size", 0))),
                    None if default is None else float(default),
                )
        return self._limits

    def _prior_input(self, parsed: float | np.ndarray | dict[str, float] | None) -> tuple[str, np.ndarray | None]:
        """The input's name and one row of it."""
        if parsed is None or isinstance(parsed, float):
            return "strength", None if parsed is None else np.array([parsed], dtype=np.float32)
        names = self.class_names() if isinstance(parsed, dict) else None
        return "target_prior", vector_of(parsed, names, self._class_count())

    def _class_count(self) -> int:
        for tensor in self._transport.model_metadata(CLASSIFIER)["inputs"]:
            if tensor["name"] == "target_prior":
                return int(tensor["shape"][-1])
        raise ServingError(f"{self.url}: classifier takes no target_prior; serve a repository that `dvc repro` wrote")


def read_image(image: bytes | str | Path, place: int = 0) -> bytes:
    """The encoded bytes of an image given as bytes or as a file, checked by decoding them as the server will.

    Raises InputError naming the file (or the image's place, from 0) and what is wrong: missing, a folder, too large,
    not a JPEG, PNG or WebP image, damaged, too many pixels. The size is bounded before the file is read.
    """
    if isinstance(image, bytes | bytearray | memoryview):
        name, data = f"image {place}", bytes(image)
    else:
        name, data = str(image), _read(Path(image))
    try:
        decode(data)
    except ImageError as error:
        raise InputError(f"{name}: {error}") from None
    return data


def _read(path: Path) -> bytes:
    hint = "give a JPEG, PNG or WebP file"
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise InputError(f"{path}: is {'a folder' if path.is_dir() else 'not a regular file'}; {hint}")
        if found.st_size > MAX_BYTES:
            raise InputError(f"{path}: has {found.st_size} bytes, above the limit of {MAX_BYTES}")
        return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else os.strerror(22)
        raise InputError(f"{path}: {reason}; {hint}") from None


def _chunks(encoded: Sequence[bytes], rows: int) -> Iterator[list[bytes]]:
    """Runs of images that one request takes: at most `rows`, and bounded in bytes."""
    chunk: list[bytes] = []
    for data in encoded:
        if chunk and (len(chunk) == rows or sum(map(len, chunk)) + len(data) > REQUEST_BYTES):
            yield chunk
            chunk = []
        chunk.append(data)
    yield chunk


def _blank_image() -> bytes:
    stream = BytesIO()
    Image.new("RGB", (32, 32), (128, 128, 128)).save(stream, "PNG")
    return stream.getvalue()

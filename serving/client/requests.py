"""Request sequences of predict, class_names and status, independent of the transport (sans I/O).

A sequence is a generator: it yields lists of calls that may be sent in parallel, and receives their responses in order.
Client and AsyncClient run the same generators over their transports.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np

from serving.client.class_maps import Segmentation, segmentations, upright_size
from serving.client.extras import EXPLAIN, PACKED, Extras, outputs_of, row_bytes
from serving.client.images import blank_image, header_pixels
from serving.client.predictions import ModelStatus, Prediction, Status, extra_parts
from serving.client.priors import Prior, as_text, parse_prior, vector_of
from serving.repository.manifest import Limits
from serving.shared.errors import InputError, ServingError
from serving.shared.names import CLASSIFIER, SEGMENTER, STUDENT
from serving.transport.failures import RequestRejected, not_triton
from serving.transport.messages import Answer, Call, Infer, ModelConfig, ModelMetadata, ServerMetadata

Result = TypeVar("Result")
Exchange = Generator[Sequence[Call], Sequence[Any], Result]

OUTPUTS = {"class": 0, "index": 0, "probability": 0}
CLASS_MAPS = {"class_map": 0, "confidence": 0, "size": 0, "names": 0}  # outputs of a release of task segmentation
# Bytes of images, texts of priors and costs in one request; recent Triton servers reject HTTP bodies above 64 MB.
REQUEST_BYTES = 48 * 1024 * 1024
REQUEST_PIXELS = Limits().request_pixels  # pixels of the images in one request: the default limit of a release
SERVE_AGAIN = "serve a repository that `dvc repro` wrote"


class RequestSequence:
    """Builds the request sequences for one server and caches its limits, inputs and class names per release."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.model = CLASSIFIER  # that takes images; `limits` sets it to `segmenter` for a server that has it
        self._limits: tuple[int, float | None] | None = None
        self._names: list[str] | None = None
        self._inputs: dict[str, int] | None = None
        self._release: int | None = None
        self._outputs: tuple[str, ...] = ()  # of extras, which the release has a default for
        self._packed = False  # whether to request the output PACKED instead of those

    def predict(
        self, encoded: Sequence[bytes], prior: Prior, version: int | None, extras: Extras | None = None
    ) -> Exchange[list[Prediction]]:
        """Return one Prediction per encoded image, in order; split into several requests by the server's limits."""
        answers = yield from self._answers(encoded, prior, version, OUTPUTS, extras)
        with self._decoding(self.model):
            return [prediction for answer in answers for prediction in _predictions(answer)]

    def segment(self, encoded: Sequence[bytes], prior: Prior, version: int | None) -> Exchange[list[Segmentation]]:
        """Return one class map per encoded image, in order. Raises ServingError if the server has no class maps."""
        sizes = [upright_size(data) for data in encoded]
        if self._limits is None:
            self.model = SEGMENTER  # also where the server restricts access to configs
        try:
            answers = yield from self._answers(encoded, prior, version, CLASS_MAPS)
        except RequestRejected as error:
            if "class_map" not in str(error) and SEGMENTER not in str(error):
                raise
            raise ServingError(f"{self.url}: serves no class maps; serve a release of task segmentation") from error
        maps: list[Segmentation] = []
        with self._decoding(self.model):
            for answer in answers:
                own = sizes[len(maps) : len(maps) + len(answer.outputs["size"])]
                maps += segmentations(answer.outputs, own, answer.version)
        return maps

    def _answers(
        self,
        encoded: Sequence[bytes],
        prior: Prior,
        version: int | None,
        outputs: Mapping[str, int],
        extras: Extras | None = None,
    ) -> Exchange[Sequence[Answer]]:
        """Return the answers of the model, in order; split into several requests by the server's limits."""
        parsed = parse_prior(prior)
        answers: Sequence[Answer] = []
        if not encoded:
            return answers
        for repeats in range(3):
            rows, default = yield from self.limits()
            name, row = yield from self._prior_input(default if parsed is None else parsed)
            wanted = yield from self._extra_inputs(extras)
            # Each version has the separate outputs: the last request lists them. Another thread may change _packed.
            packed = repeats < 2 and self._packed and bool(outputs_of(wanted) or self._outputs)
            answers = yield [
                image_call(chunk, name, row, version, wanted, self._outputs, outputs, self.model, packed)
                for chunk in chunks(encoded, rows, row_bytes(row, *wanted.values()))
            ]
            # A new release may change the classes and the default prior: repeat requests built from the old values.
            changed = version is None and self._release_changed(answers)
            named = isinstance(parsed, dict) or (extras is not None and extras.names_needed)
            if packed and any(PACKED not in each.outputs for each in answers):
                self._packed = False  # a version that an older Tailor wrote has only the separate outputs
            elif not (changed and (parsed is None or named)):
                break
        return answers

    def predict_each(
        self,
        encoded: Sequence[bytes | InputError],
        prior: Prior,
        version: int | None,
        keep_going: bool,
        extras: Extras | None = None,
    ) -> Exchange[list[Prediction | ServingError]]:
        """Run predict; with keep_going an unreadable or rejected image is replaced by its error."""
        images = [data for data in encoded if isinstance(data, bytes)]
        results: list[Prediction | ServingError] = []
        try:
            results += yield from self.predict(images, prior, version, extras)
        except RequestRejected as error:
            if not keep_going:
                raise
            # One bad image fails its whole request: send each image in a separate request.
            for data in images:
                try:
                    results += (
                        [error] if len(images) == 1 else (yield from self.predict([data], prior, version, extras))
                    )
                except RequestRejected as image_error:
                    results.append(image_error)
        remaining = iter(results)
        return [next(remaining) if isinstance(data, bytes) else data for data in encoded]

    def limits(self) -> Exchange[tuple[int, float | None]]:
        """Return the largest batch and the default strength; (1, None) where the server restricts access to configs."""
        if self._limits is None:
            config = yield from self._config()
            if config is None:
                self._limits = (1, None)
            else:
                with self._decoding(self.model):
                    default = config.get("parameters", {}).get("default_strength", {}).get("string_value")
                    rows = max(1, int(config.get("max_batch_size", 0)))
                    if inputs := config.get("input"):
                        self._inputs = {tensor["name"]: int(tensor["dims"][-1]) for tensor in inputs}
                    outputs = config.get("parameters", {}).get("default_outputs", {}).get("string_value", "")
                    self._outputs = tuple(filter(None, outputs.split(",")))
                    self._packed = any(tensor["name"] == PACKED for tensor in config.get("output", []))
                    self._limits = (rows, None if default is None else float(default))
        return self._limits

    def _config(self) -> Exchange[Any]:
        """Return the config of the model that takes images, and set `model`; None if the server returns neither config."""
        for model in (self.model, SEGMENTER if self.model == CLASSIFIER else CLASSIFIER):
            try:
                [config] = yield [ModelConfig(model)]
            except RequestRejected:
                continue
            self.model = model
            return config
        return None

    def class_names(self) -> Exchange[list[str]]:
        """Return the server's class names by index, from the labels of `student`."""
        if self._names is None:
            [metadata] = yield [ModelMetadata(STUDENT)]
            with self._decoding(STUDENT):
                if any(tensor["name"] == "adjustment" for tensor in metadata["inputs"]):
                    return (yield from self._segmentation_names())
                [shape] = [tensor["shape"] for tensor in metadata["inputs"] if tensor["name"] == "image"]
                image = np.full([1, *(int(side) for side in shape[1:])], 128, dtype=np.uint8)
            inputs = {"image": image, "strength": np.zeros((1, 1), dtype=np.float32)}
            classes = yield from self._class_count()
            [answer] = yield [Infer(STUDENT, inputs, {"logits": classes})]
            with self._decoding(STUDENT):
                labels = [text.decode().split(":", 2) for text in answer.outputs["logits"].reshape(-1)]
            if any(len(parts) != 3 for parts in labels):
                raise ServingError(f"{self.url}: student has no class labels; give the prior as a list, not by name")
            self._names = [name for _, _, name in sorted(labels, key=lambda parts: int(parts[1]))]
        return list(self._names)

    def _segmentation_names(self) -> Exchange[list[str]]:
        """Return the class names of a release of task segmentation, whose logits have no labels."""
        [answer] = yield [image_call([blank_image()], "prior", None, None, outputs={"names": 0}, model=SEGMENTER)]
        with self._decoding(SEGMENTER):
            self._names = [name.decode() for name in answer.outputs["names"][0]]
        return list(self._names)

    def status(self) -> Exchange[Status]:
        """Return the state and versions of the server and its models."""
        [server] = yield [ServerMetadata()]
        models = []
        yield from self.limits()  # sets the name of the second model
        for name in (STUDENT, self.model):
            try:
                [metadata] = yield [ModelMetadata(name)]
            except RequestRejected:
                metadata = {}
            with self._decoding(name):
                versions = tuple(sorted(int(version) for version in metadata.get("versions", [])))
            models.append(ModelStatus(name, versions))
        problem = None
        try:
            yield from self.predict([blank_image()], None, None)
        except ServingError as error:
            problem = str(error)
        with self._decoding("server"):
            return Status(self.url, server["name"], server["version"], tuple(models), problem is None, problem)

    def request(self, encoded: Sequence[bytes], prior: Prior, version: int | None) -> Exchange[Infer]:
        """Return a single request for encoded images. Raises InputError when they exceed the largest batch."""
        parsed = parse_prior(prior)
        rows, default = yield from self.limits()
        if len(encoded) > rows:
            raise InputError(f"{len(encoded)} images are more than the {rows} that {self.url} accepts in one request")
        name, row = yield from self._prior_input(default if parsed is None else parsed)
        return image_call(encoded, name, row, version, model=self.model)

    def _prior_input(
        self, parsed: float | np.ndarray | dict[str, float] | str | None
    ) -> Exchange[tuple[str, np.ndarray | None]]:
        """Return the name of the input for a prior and one row of it; row None selects the server's default.

        The input `prior` takes every kind as text, because Triton batches only requests with the same inputs. A server
        of an older Tailor without this input gets `strength` or `target_prior` instead.
        """
        if parsed is None:
            return "prior", None
        vector = None
        if not isinstance(parsed, float | str):
            names = (yield from self.class_names()) if isinstance(parsed, dict) else None
            vector = vector_of(parsed, names, (yield from self._class_count()))
        try:
            inputs = yield from self._model_inputs()
        except RequestRejected:
            if not isinstance(parsed, float):
                raise
            inputs = {}  # metadata is restricted: use `strength`, which every release supports
        if "prior" in inputs:
            return "prior", np.array([as_text(parsed if vector is None else vector)], dtype=np.object_)
        if isinstance(parsed, str):
            raise ServingError(f"{self.url}: {self.model} has no input `prior`; {SERVE_AGAIN}")
        if vector is None:
            return "strength", np.array([parsed], dtype=np.float32)
        return "target_prior", vector.astype(np.float32)

    def _extra_inputs(self, extras: Extras | None) -> Exchange[dict[str, np.ndarray]]:
        """Return one row of each input that the extras need. Raises ServingError if an older server has no such input."""
        if extras is None:
            return {}
        names = (yield from self.class_names()) if extras.names_needed else None
        rows = extras.inputs(names)
        existing = yield from self._model_inputs()
        if missing := [name for name in rows if name not in existing]:
            hint = "omit it" if self.model == SEGMENTER else SERVE_AGAIN
            raise ServingError(f"{self.url}: {self.model} has no input `{missing[0]}`; {hint}")
        return rows

    @contextmanager
    def _decoding(self, source: str) -> Iterator[None]:
        """Convert the exceptions of parsing a response that is not Triton's into ServingError."""
        try:
            yield
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise not_triton(self.url, f"its response for {source} is not Triton's") from error

    def _release_changed(self, answers: Sequence[Answer]) -> bool:
        """Return whether the responses come from a new release; if so, clear the cached limits, names and inputs."""
        newest = max(answer.version for answer in answers)
        before, self._release = self._release, newest
        if before in (None, newest):
            return False
        self._limits = self._names = self._inputs = None
        return True

    def _class_count(self) -> Exchange[int]:
        count = (yield from self._model_inputs()).get("target_prior")
        if not count:
            raise ServingError(f"{self.url}: {self.model} has no input `target_prior`; {SERVE_AGAIN}")
        return count

    def _model_inputs(self) -> Exchange[dict[str, int]]:
        """Return the inputs of the model by name, with the length of a row."""
        if self._inputs is None:
            [metadata] = yield [ModelMetadata(self.model)]
            with self._decoding(self.model):
                self._inputs = {tensor["name"]: int(tensor["shape"][-1]) for tensor in metadata["inputs"]}
        return self._inputs


def image_call(
    encoded: Sequence[bytes],
    name: str,
    row: np.ndarray | None,
    version: int | None,
    extras: Mapping[str, np.ndarray] = MappingProxyType({}),
    defaults: Sequence[str] = (),
    outputs: Mapping[str, int] = MappingProxyType(OUTPUTS),
    model: str = CLASSIFIER,
    packed: bool = False,
) -> Infer:
    """Build a request to a model: encoded images, and the input `name` with `row` (the prior) for each image.

    extras: rows of further inputs; the request names their outputs. defaults: further outputs that the response may have.
    packed: request the output PACKED instead of these.
    """
    inputs = {"image": np.array(encoded, dtype=np.object_).reshape(-1, 1)}
    rows = dict(extras) if row is None else {name: row, **extras}
    inputs |= {each: np.repeat(values[None], len(encoded), axis=0) for each, values in rows.items()}
    further = outputs_of(extras)
    optional = tuple(name for name in defaults if name not in further)
    if packed:
        further, optional = {}, (PACKED,)
    requested = {**outputs, **further}
    optional += EXPLAIN if "explain" in extras else ()
    return Infer(model, inputs, requested, "" if version is None else str(version), optional)


def chunks(encoded: Sequence[bytes], rows: int, further: int = 0) -> Iterator[list[bytes]]:
    """Split images into lists for one request each: at most `rows`, REQUEST_BYTES and REQUEST_PIXELS.

    further: bytes of the other inputs of each image.
    """
    chunk, size, pixels = list[bytes](), 0, 0
    for data in encoded:
        more, length = header_pixels(data) if len(encoded) > 1 else 0, len(data) + further
        if chunk and (len(chunk) == rows or size + length > REQUEST_BYTES or pixels + more > REQUEST_PIXELS):
            yield chunk
            chunk, size, pixels = [], 0, 0
        chunk.append(data)
        size, pixels = size + length, pixels + more
    yield chunk


def _predictions(answer: Answer) -> Iterator[Prediction]:
    columns = (answer.outputs[name] for name in OUTPUTS)
    for row, (names, indexes, probabilities) in enumerate(zip(*columns, strict=True)):
        yield Prediction(
            tuple(name.decode() for name in names),
            tuple(int(index) for index in indexes),
            tuple(float(probability) for probability in probabilities),
            answer.version,
            **extra_parts(answer, row),
        )

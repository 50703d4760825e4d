"""Run Triton's models in this process, on a fake of Triton's Python backend."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import json_format, text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from serving.repository.model_config import EXTRA_OUTPUTS
from serving.server.triton_server import TritonServer


@dataclass
class Tensor:
    name: str
    array: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.array


class TritonError:
    INVALID_ARG, INTERNAL = "invalid", "internal"

    def __init__(self, message: str, code: str) -> None:
        self.text, self.code = message, code

    def message(self) -> str:
        return self.text


@dataclass
class Response:
    tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None
    listed: list[str] | None = None  # outputs that a request lists

    def request_id(self) -> str:
        return "an id"

    def requested_output_names(self) -> list[str]:
        """The listed outputs; all outputs of both models, as Triton returns for a request that lists none."""
        return self.listed or ["logits", "feature", "class", "index", "probability", *EXTRA_OUTPUTS]

    def has_error(self) -> bool:
        return self.error is not None

    def __getitem__(self, name: str) -> np.ndarray:
        return next(tensor.array for tensor in self.tensors if tensor.name == name)


class TritonModelException(Exception):
    pass


class MetricFamily:
    COUNTER = "counter"

    def __init__(self, name: str, **_options: str) -> None:
        self.name = name
        self.metrics: dict[frozenset, Metric] = {}

    def Metric(self, labels: dict[str, str]) -> Metric:
        return self.metrics.setdefault(frozenset(labels.items()), Metric())


class Metric:
    value = 0.0

    def increment(self, value: float) -> None:
        self.value += value


def by_name(holder: Any, name: str) -> Tensor | None:
    return next((tensor for tensor in holder.tensors if tensor.name == name), None)


def backend() -> types.ModuleType:
    module = types.ModuleType("triton_python_backend_utils")
    module.Tensor, module.TritonError, module.InferenceResponse = Tensor, TritonError, Response
    module.TritonModelException, module.MetricFamily = TritonModelException, MetricFamily
    module.get_input_tensor_by_name = module.get_output_tensor_by_name = by_name
    module.PreferredMemory, module.TRITONSERVER_MEMORY_CPU = (lambda *_arguments: None), 0
    return module


def load(repository: Path, name: str, config: str, utilities: types.ModuleType) -> Any:
    """Load a model of a repository and initialise it as Triton's inference process does."""
    path = repository / name / "1" / "model.py"
    spec = importlib.util.spec_from_file_location(f"tried_{name}", path)
    module = importlib.util.module_from_spec(spec)
    parsed = text_format.Parse((repository / name / config).read_text(), ModelConfig())
    described = json_format.MessageToDict(parsed, preserving_proto_field_name=True)
    arguments = {
        "model_repository": str(repository / name),
        "model_version": "1",
        "model_instance_name": f"{name}_0_0",
        "model_config": json.dumps({"parameters": {}} | described),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "triton_python_backend_utils", utilities)
        spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        model.initialize(arguments)
    return model


@pytest.fixture
def student(repository: Path) -> Any:
    return load(repository, "student", "configs/local.pbtxt", backend())


@pytest.fixture
def calls() -> list[tuple[str, int, int]]:
    """Record of the classifier's calls to other models: model, version and rows."""
    return []


@pytest.fixture
def classifier(repository: Path, student: Any, calls: list) -> Iterator[Any]:
    utilities = backend()

    class InferenceRequest:
        def __init__(
            self,
            model_name: str,
            model_version: int,
            inputs: list[Tensor],
            requested_output_names: list[str],
            **_options: object,
        ) -> None:
            calls.append((model_name, model_version, len(inputs[0].array)))
            self.tensors, self.names = inputs, requested_output_names

        def requested_output_names(self) -> list[str]:
            return self.names

        def exec(self) -> Response:
            return student.execute([self])[0]

    utilities.InferenceRequest = InferenceRequest
    model = load(repository, "classifier", "config.pbtxt", utilities)
    yield model
    model.finalize()


def request(images: list[bytes], **inputs: object) -> Response:
    encoded = Tensor("image", np.array(images, dtype=np.object_).reshape(-1, 1))
    return Response([encoded, *(Tensor(name, np.asarray(value, dtype=np.float32)) for name, value in inputs.items())])


def counted(metrics: Any, family: str) -> dict[tuple[str, ...], float]:
    """Return the values of a metric family, by the values of its labels except the version."""
    metrics.flush()
    return {
        tuple(value for name, value in sorted(labels) if name != "version"): metric.value
        for labels, metric in metrics.families[family].metrics.items()
    }


def scrape(server: TritonServer) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.ports['--metrics-port']}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

"""The config.pbtxt of the two models, built as Triton's own message type so that a wrong field cannot be written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from serving.repository.manifest import Manifest
from serving.shared.errors import InputError
from serving.shared.names import CLASSIFIER, LABELS_NAME, STUDENT

Device = Literal["cpu", "gpu"]
Precision = Literal["fp32", "fp16"]

OWN_NETWORK = "own"  # of the parameter `network`: the classifier runs the graph itself
CLASSIFIER_INSTANCES = 2
# A graph of which several copies fit into memory: a ResNet-50 has 94 MB.
SMALL_GRAPH_BYTES = 128_000_000

# 0 is ONNX Runtime's own word for "one thread per core". Writing this machine's core count instead would make the
# repository differ from machine to machine, and wrong on the one that serves it.
THREAD_PER_CORE = "0"
ENGINE_CACHE = "/tmp/tailor-engines"


@dataclass(frozen=True)
class Placement:
    """Where the network runs, and in how many instances (on a GPU: on each).

    gpus: their numbers, all where empty. instances: of `student`; None is two of a graph of up to 128 MB on the local
    server's CPU, one otherwise. own_network: whether the local server's `classifier` runs the graph itself instead of
    asking `student`; None is for such a graph on a CPU. tensorrt: the precision in which TensorRT runs the graph inside
    the onnxruntime backend; None leaves it to ONNX Runtime's CUDA provider. Raises InputError where these do not go
    together.
    """

    device: Device = "cpu"
    gpus: Sequence[int] = ()
    instances: int | None = None
    tensorrt: Precision | None = None
    own_network: bool | None = None

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "gpu"):
            raise InputError(f"device is {self.device!r}; expected cpu or gpu")
        if self.device == "cpu" and (self.gpus or self.tensorrt):
            raise InputError("device is cpu; expected gpu where GPUs are numbered or TensorRT is asked for")
        if any(gpu < 0 for gpu in self.gpus) or len(set(self.gpus)) != len(self.gpus):
            raise InputError(f"gpus are {list(self.gpus)}; expected different numbers from 0")
        if self.own_network and self.device == "gpu":
            raise InputError(
                "own_network is for device cpu; on a GPU `classifier` asks `student`, which shares batches"
            )
        if self.instances is not None and self.instances < 1:
            raise InputError(f"instances is {self.instances}; expected at least 1")
        if self.tensorrt not in (None, "fp32", "fp16"):
            raise InputError(f"tensorrt is {self.tensorrt!r}; expected fp32 or fp16")

    def decided(self, graph_bytes: int) -> Placement:
        """The placement of a graph of this size, with what was left open decided."""
        small = self.device == "cpu" and graph_bytes <= SMALL_GRAPH_BYTES
        own = small if self.own_network is None else self.own_network
        return replace(self, instances=self.instances or (2 if small else 1), own_network=own)


def student_config(manifest: Manifest, placement: Placement) -> ModelConfig:
    """`student` for the onnxruntime backend: the exported graph.

    One instance unless more are asked for: the backend gives each all cores, and two would take them from one another.
    """
    config = _student_signature(manifest)
    config.backend = "onnxruntime"
    config.default_model_filename = "model.onnx"
    kind = ModelInstanceGroup.Kind.KIND_GPU if placement.device == "gpu" else ModelInstanceGroup.Kind.KIND_CPU
    config.instance_group.add(count=placement.instances or 1, kind=kind, gpus=placement.gpus)
    if placement.tensorrt:
        accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
        accelerator.parameters["precision_mode"] = placement.tensorrt.upper()
        # Without it an engine is built anew, for minutes, at every start. The path is the server's, not this machine's.
        accelerator.parameters["trt_engine_cache_enable"] = "1"
        accelerator.parameters["trt_engine_cache_path"] = ENGINE_CACHE
        # And without these it is built anew at each batch size that is larger than all before.
        for bound, rows in (("min", 1), ("opt", manifest.max_batch_size), ("max", manifest.max_batch_size)):
            shapes = [f"{tensor.name}:{'x'.join(map(str, (rows, *tensor.dims)))}" for tensor in config.input]
            accelerator.parameters[f"trt_profile_{bound}_shapes"] = ",".join(shapes)
        _add_warmup(config, manifest)
    return config


def student_local_config(manifest: Manifest, placement: Placement) -> ModelConfig:
    """`student` for the python backend: the stand-in that runs the same file where there is no onnxruntime backend.

    Its instance is a CPU instance even on a GPU, because Triton hands the tensors over in host memory; the parameter
    `execution_provider` decides where ONNX Runtime computes.
    """
    config = _student_signature(manifest)
    config.backend = "python"
    config.default_model_filename = "model.py"
    config.instance_group.add(count=placement.instances or 1, kind=ModelInstanceGroup.Kind.KIND_CPU)
    provider = "CUDAExecutionProvider" if placement.device == "gpu" else "CPUExecutionProvider"
    config.parameters["execution_provider"].string_value = provider
    return config


def classifier_local_config(manifest: Manifest, placement: Placement) -> ModelConfig:
    """`classifier` for the local server, which may run the graph itself, as the stand-in of `student` does."""
    config = classifier_config(manifest)
    if placement.own_network:
        config.instance_group[0].count = max(CLASSIFIER_INSTANCES, placement.instances or 1)
        config.parameters["network"].string_value = OWN_NETWORK
        config.parameters["execution_provider"].string_value = "CPUExecutionProvider"
        config.parameters["intra_op_thread_count"].string_value = THREAD_PER_CORE
    return config


def classifier_config(manifest: Manifest) -> ModelConfig:
    """`classifier`: encoded images in, the best classes out; the python backend everywhere.

    `default_strength` tells a client what an absent `strength` means, so that it can always send one: Triton puts
    requests with and without an optional input in different batches.
    """
    config = _common(CLASSIFIER, manifest)
    config.backend = "python"
    config.default_model_filename = "model.py"
    config.input.add(name="image", data_type=DataType.TYPE_STRING, dims=[1])
    config.input.add(name="strength", data_type=DataType.TYPE_FP32, dims=[1], optional=True)
    config.input.add(name="target_prior", data_type=DataType.TYPE_FP32, dims=[len(manifest.classes)], optional=True)
    config.input.add(name="prior", data_type=DataType.TYPE_STRING, dims=[1], optional=True)
    config.output.add(name="class", data_type=DataType.TYPE_STRING, dims=[manifest.top_k])
    config.output.add(name="index", data_type=DataType.TYPE_INT32, dims=[manifest.top_k])
    config.output.add(name="probability", data_type=DataType.TYPE_FP32, dims=[manifest.top_k])
    config.instance_group.add(count=CLASSIFIER_INSTANCES, kind=ModelInstanceGroup.Kind.KIND_CPU)
    config.parameters["default_strength"].string_value = repr(manifest.strength)
    return config


def to_text(config: ModelConfig) -> str:
    """A config as the text of a config.pbtxt."""
    return text_format.MessageToString(config)


def _student_signature(manifest: Manifest) -> ModelConfig:
    config = _common(STUDENT, manifest)
    size = manifest.image.size
    config.input.add(name="image", data_type=DataType.TYPE_UINT8, dims=[3, size, size])
    config.input.add(name="strength", data_type=DataType.TYPE_FP32, dims=[1])
    # With the labels Triton names the classes itself for a client that asks for a classification of `logits`.
    config.output.add(
        name="logits", data_type=DataType.TYPE_FP32, dims=[len(manifest.classes)], label_filename=LABELS_NAME
    )
    config.output.add(name="feature", data_type=DataType.TYPE_FP32, dims=[manifest.feature_dim])
    config.parameters["intra_op_thread_count"].string_value = THREAD_PER_CORE
    return config


def _add_warmup(config: ModelConfig, manifest: Manifest) -> None:
    """Have Triton run the smallest and the largest batch before the model counts as loaded: TensorRT builds then."""
    for batch_size in sorted({1, manifest.max_batch_size}):
        warmup = config.model_warmup.add(name=f"batch_{batch_size}", batch_size=batch_size)
        for tensor in config.input:
            sample = warmup.inputs[tensor.name]
            sample.data_type = tensor.data_type
            sample.dims.extend(tensor.dims)
            sample.zero_data = True


def _common(name: str, manifest: Manifest) -> ModelConfig:
    config = ModelConfig(name=name, max_batch_size=manifest.max_batch_size)
    # One by one, as Triton would answer from the newest folder under `latest`, whether it was promoted or not.
    config.version_policy.specific.versions.append(manifest.version)
    # Present and empty: batches form from what waits. A queue delay or a queue policy costs a multiple of its gain.
    config.dynamic_batching.SetInParent()
    return config

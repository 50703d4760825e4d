"""Build the config.pbtxt of both models, as Triton's protobuf message, which has no unknown fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from serving.repository.manifest import Manifest, SegmentationFormat
from serving.shared.errors import InputError
from serving.shared.names import CLASSIFIER, LABELS_NAME, STUDENT

Device = Literal["cpu", "gpu"]
Precision = Literal["fp32", "fp16"]

OWN_NETWORK = "own"  # value of the parameter `network`: the classifier runs the graph itself
CLASSIFIER_INSTANCES = 2
# Of a graph up to this size several copies fit into memory: a ResNet-50 has 94 MB.
SMALL_GRAPH_BYTES = 128_000_000

# 0 means one thread per core in ONNX Runtime. The core count of this machine would be wrong on the machine that serves
# the repository.
THREAD_PER_CORE = "0"
EXTRA_INPUTS = {
    "coverage": DataType.TYPE_FP32, "costs": DataType.TYPE_STRING, "ask": DataType.TYPE_FP32,
    "false_alarms": DataType.TYPE_FP32, "level": DataType.TYPE_FP32, "explain": DataType.TYPE_UINT8,
}  # fmt: skip
# New names last: an older config gets them appended, and signatures compare the order.
EXTRA_OUTPUTS = {
    "set": DataType.TYPE_STRING, "set_size": DataType.TYPE_INT32, "decision": DataType.TYPE_STRING,
    "decision_index": DataType.TYPE_INT32, "expected_cost": DataType.TYPE_FP32,
    "unknown": DataType.TYPE_BOOL, "typicality": DataType.TYPE_FP32,
    "node": DataType.TYPE_STRING, "node_probability": DataType.TYPE_FP32,
    "nearest": DataType.TYPE_STRING, "nearest_class": DataType.TYPE_STRING, "nearest_cosine": DataType.TYPE_FP32,
    "nearest_image": DataType.TYPE_STRING, "activation_map": DataType.TYPE_FP32,
    "activation_crop": DataType.TYPE_FP32, "extras": DataType.TYPE_STRING,
}  # fmt: skip
# Outputs whose size differs between requests; all others have one value a row.
EXTRA_DIMS = {
    "set": [-1], "nearest": [-1], "nearest_class": [-1], "nearest_cosine": [-1], "nearest_image": [-1],
    "activation_map": [-1, -1],
}  # fmt: skip
ENGINE_CACHE = "/tmp/tailor-engines"


@dataclass(frozen=True)
class Placement:
    """Device and number of instances of the network.

    gpus: GPU numbers, all GPUs if empty. instances: of `student`, on each GPU; None means two for a graph of up to 128
    MB on the local server's CPU, else one. own_network: whether the local server's `classifier` runs the graph itself
    instead of sending requests to `student`; None means yes for such a graph on a CPU. tensorrt: precision of TensorRT
    in the onnxruntime backend; None uses ONNX Runtime's CUDA provider. Raises InputError for values that exclude each
    other.
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
            raise InputError("device is cpu; expected gpu where GPUs are numbered or TensorRT is requested")
        if any(gpu < 0 for gpu in self.gpus) or len(set(self.gpus)) != len(self.gpus):
            raise InputError(f"gpus are {list(self.gpus)}; expected different numbers from 0")
        if self.own_network and self.device == "gpu":
            raise InputError(
                "own_network is for device cpu; on a GPU `classifier` sends requests to `student`, which batches them"
            )
        if self.instances is not None and self.instances < 1:
            raise InputError(f"instances is {self.instances}; expected at least 1")
        if self.tensorrt not in (None, "fp32", "fp16"):
            raise InputError(f"tensorrt is {self.tensorrt!r}; expected fp32 or fp16")

    def decided(self, graph_bytes: int) -> Placement:
        """This placement with the values that are None set by the size of the graph."""
        small = self.device == "cpu" and graph_bytes <= SMALL_GRAPH_BYTES
        own = small if self.own_network is None else self.own_network
        return replace(self, instances=self.instances or (2 if small else 1), own_network=own)


def student_config(manifest: Manifest, placement: Placement) -> ModelConfig:
    """Config of `student` for the onnxruntime backend, which runs the exported graph.

    One instance by default: each instance of this backend uses all cores, so two would compete for them.
    """
    config = _student_signature(manifest)
    config.backend = "onnxruntime"
    config.default_model_filename = "model.onnx"
    kind = ModelInstanceGroup.Kind.KIND_GPU if placement.device == "gpu" else ModelInstanceGroup.Kind.KIND_CPU
    config.instance_group.add(count=placement.instances or 1, kind=kind, gpus=placement.gpus)
    if placement.tensorrt:
        accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
        accelerator.parameters["precision_mode"] = placement.tensorrt.upper()
        # Without the cache TensorRT builds the engine at every start, for minutes. The path is on the server.
        accelerator.parameters["trt_engine_cache_enable"] = "1"
        accelerator.parameters["trt_engine_cache_path"] = ENGINE_CACHE
        # Without the shapes it builds the engine again for each batch size that is larger than all before.
        for bound, rows in (("min", 1), ("opt", manifest.max_batch_size), ("max", manifest.max_batch_size)):
            shapes = [f"{tensor.name}:{'x'.join(map(str, (rows, *tensor.dims)))}" for tensor in config.input]
            accelerator.parameters[f"trt_profile_{bound}_shapes"] = ",".join(shapes)
        _add_warmup(config, manifest)
    return config


def student_local_config(manifest: Manifest, placement: Placement) -> ModelConfig:
    """Config of `student` for the local server: the python backend runs the graph, as it has no onnxruntime backend.

    The instance is of kind CPU also for a GPU, so that Triton passes tensors in host memory; the parameter
    `execution_provider` selects the device on which ONNX Runtime computes.
    """
    config = _student_signature(manifest)
    config.backend = "python"
    config.default_model_filename = "model.py"
    config.instance_group.add(count=placement.instances or 1, kind=ModelInstanceGroup.Kind.KIND_CPU)
    provider = "CUDAExecutionProvider" if placement.device == "gpu" else "CPUExecutionProvider"
    config.parameters["execution_provider"].string_value = provider
    return config


def classifier_local_config(manifest: Manifest, placement: Placement) -> ModelConfig:
    """Config of `classifier` or `segmenter` for the local server; with own_network it runs the graph itself, on the CPU."""
    config = classifier_config(manifest)
    if placement.own_network:
        config.instance_group[0].count = max(CLASSIFIER_INSTANCES, placement.instances or 1)
        config.parameters["network"].string_value = OWN_NETWORK
        config.parameters["execution_provider"].string_value = "CPUExecutionProvider"
        config.parameters["intra_op_thread_count"].string_value = THREAD_PER_CORE
    return config


def classifier_config(manifest: Manifest) -> ModelConfig:
    """Config of `classifier` or `segmenter`: encoded images in, classes out; always the python backend.

    The parameter `default_strength` is the value of an absent `strength`. A client can read it and always send a
    strength: Triton does not put requests with and without an optional input into one batch.
    """
    config = _common(manifest.image_model, manifest)
    config.backend = "python"
    config.default_model_filename = "model.py"
    config.input.add(name="image", data_type=DataType.TYPE_STRING, dims=[1])
    config.input.add(name="strength", data_type=DataType.TYPE_FP32, dims=[1], optional=True)
    config.input.add(name="target_prior", data_type=DataType.TYPE_FP32, dims=[len(manifest.classes)], optional=True)
    config.input.add(name="prior", data_type=DataType.TYPE_STRING, dims=[1], optional=True)
    config.output.add(name="class", data_type=DataType.TYPE_STRING, dims=[manifest.top_k])
    config.output.add(name="index", data_type=DataType.TYPE_INT32, dims=[manifest.top_k])
    config.output.add(name="probability", data_type=DataType.TYPE_FP32, dims=[manifest.top_k])
    if manifest.segmentation:
        # The classes above are then the largest ones of the class map, and `probability` is their share of the pixels.
        _add_class_maps(config, manifest.segmentation)
        config.output.add(name="size", data_type=DataType.TYPE_INT32, dims=[2])
        config.output.add(name="names", data_type=DataType.TYPE_STRING, dims=[len(manifest.classes)])
    add_extras(config)
    config.instance_group.add(count=CLASSIFIER_INSTANCES, kind=ModelInstanceGroup.Kind.KIND_CPU)
    set_defaults(config, manifest.strength, default_outputs(manifest))
    return config


def default_outputs(manifest: Manifest) -> list[str]:
    """The outputs of extras that every response of a release has, because the manifest has a default for them."""
    sets = ["set", "set_size"] if manifest.sets and manifest.sets.coverage is not None else []
    decision = ["decision", "decision_index", "expected_cost"] if manifest.decision else []
    unknown = ["unknown", "typicality"] if manifest.unknown and manifest.unknown.false_alarms is not None else []
    nodes = ["node", "node_probability"] if manifest.taxonomy and manifest.taxonomy.level is not None else []
    return sets + decision + unknown + nodes


def set_defaults(config: ModelConfig, strength: float, outputs: Sequence[str]) -> None:
    """Set the parameters of `classifier` that a client reads: the default strength, and the outputs that it may request."""
    config.parameters["default_strength"].string_value = repr(strength)
    if outputs:
        config.parameters["default_outputs"].string_value = ",".join(outputs)
    else:
        config.parameters.pop("default_outputs", None)


def add_extras(config: ModelConfig) -> None:
    """Add the optional inputs of serving/triton/extras.py and their outputs to a config of `classifier` that lacks them.

    A response has an output only if it is wanted, so requests of older clients get the outputs that they know.
    """
    if config.name != CLASSIFIER:
        return
    existing = {tensor.name for tensor in (*config.input, *config.output)}
    for name, data_type in EXTRA_INPUTS.items():
        if name not in existing:
            config.input.add(name=name, data_type=data_type, dims=[1], optional=True)
    for name, data_type in EXTRA_OUTPUTS.items():
        if name not in existing:
            config.output.add(name=name, data_type=data_type, dims=EXTRA_DIMS.get(name, [1]))


def to_text(config: ModelConfig) -> str:
    """A config as the text of a config.pbtxt."""
    return text_format.MessageToString(config)


def _student_signature(manifest: Manifest) -> ModelConfig:
    config = _common(STUDENT, manifest)
    config.parameters["intra_op_thread_count"].string_value = THREAD_PER_CORE
    classes = len(manifest.classes)
    if canvas := manifest.segmentation:
        config.input.add(name="image", data_type=DataType.TYPE_UINT8, dims=[3, canvas.height, canvas.width])
        config.input.add(name="adjustment", data_type=DataType.TYPE_FP32, dims=[classes])
        _add_class_maps(config, canvas)
        config.output.add(name="logits", data_type=DataType.TYPE_FP32, dims=[classes, *canvas.cells])
        return config
    size = manifest.image.size
    config.input.add(name="image", data_type=DataType.TYPE_UINT8, dims=[3, size, size])
    config.input.add(name="strength", data_type=DataType.TYPE_FP32, dims=[1])
    # With the labels Triton returns class names to a client that requests a classification of `logits`.
    config.output.add(name="logits", data_type=DataType.TYPE_FP32, dims=[classes], label_filename=LABELS_NAME)
    config.output.add(name="feature", data_type=DataType.TYPE_FP32, dims=[manifest.feature_dim])
    if manifest.explain and manifest.explain.map:
        dims = [manifest.feature_dim, *manifest.explain.map]
        config.output.add(name="feature_map", data_type=DataType.TYPE_FP32, dims=dims)
    return config


def _add_class_maps(config: ModelConfig, canvas: SegmentationFormat) -> None:
    for name in ("class_map", "confidence"):
        config.output.add(name=name, data_type=DataType.TYPE_UINT8, dims=[canvas.height, canvas.width])


def _add_warmup(config: ModelConfig, manifest: Manifest) -> None:
    """Make Triton run the smallest and largest batch before the model is ready, so that TensorRT builds its engines."""
    for batch_size in sorted({1, manifest.max_batch_size}):
        warmup = config.model_warmup.add(name=f"batch_{batch_size}", batch_size=batch_size)
        for tensor in config.input:
            sample = warmup.inputs[tensor.name]
            sample.data_type = tensor.data_type
            sample.dims.extend(tensor.dims)
            sample.zero_data = True


def _common(name: str, manifest: Manifest) -> ModelConfig:
    config = ModelConfig(name=name, max_batch_size=manifest.max_batch_size)
    # `specific`, because with `latest` Triton would serve the newest folder, promoted or not.
    config.version_policy.specific.versions.append(manifest.version)
    # Present and empty: a batch has the requests that wait. A queue delay or queue policy costs a multiple of its gain.
    config.dynamic_batching.SetInParent()
    return config

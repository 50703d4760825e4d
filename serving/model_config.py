"""The config.pbtxt of the two models, built as Triton's own message type so that a wrong field cannot be written."""

from __future__ import annotations

from typing import Literal

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from serving.manifest import Manifest

Device = Literal["cpu", "gpu"]

STUDENT = "student"
CLASSIFIER = "classifier"
LABELS_NAME = "labels.txt"
VERSIONS_SERVED = 2
CLASSIFIER_INSTANCES = 2

# 0 is ONNX Runtime's own word for "one thread per core". Writing this machine's core count instead would make the
# repository differ from machine to machine, and wrong on the one that serves it.
THREAD_PER_CORE = "0"


def student_config(manifest: Manifest, device: Device) -> ModelConfig:
    """`student` for the onnxruntime backend: the exported graph on one instance."""
    config = _student_signature(manifest)
    config.backend = "onnxruntime"
    config.default_model_filename = "model.onnx"
    kind = ModelInstanceGroup.Kind.KIND_GPU if device == "gpu" else ModelInstanceGroup.Kind.KIND_CPU
    config.instance_group.add(count=1, kind=kind)
    return config


def student_local_config(manifest: Manifest, device: Device) -> ModelConfig:
    """`student` for the python backend: the stand-in that runs the same file where there is no onnxruntime backend.

    Its instance is a CPU instance even on a GPU, because Triton hands the tensors over in host memory; the parameter
    `execution_provider` decides where ONNX Runtime computes.
    """
    config = _student_signature(manifest)
    config.backend = "python"
    config.default_model_filename = "model.py"
    config.instance_group.add(count=1, kind=ModelInstanceGroup.Kind.KIND_CPU)
    provider = "CUDAExecutionProvider" if device == "gpu" else "CPUExecutionProvider"
    config.parameters["execution_provider"].string_value = provider
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


def _common(name: str, manifest: Manifest) -> ModelConfig:
    config = ModelConfig(name=name, max_batch_size=manifest.max_batch_size)
    config.version_policy.latest.num_versions = VERSIONS_SERVED
    # Present and empty: batches form from what waits. A queue delay or a queue policy costs a multiple of its gain.
    config.dynamic_batching.SetInParent()
    return config

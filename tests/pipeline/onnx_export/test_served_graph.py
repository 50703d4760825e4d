"""The exported graph against the training path: in PyTorch, and as an ONNX file in ONNX Runtime."""

import os
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from models.networks.cosine_classifier import CausalClassifier, ImageClassifier, LinearClassifier
from models.prior import adjust_logits
from pipeline.data.dataset import normalise
from pipeline.onnx_export.graph import ServedStudent, to_onnx
from tests.support.making import ROOT, params

pytestmark = pytest.mark.slow

LOG_PRIOR = [-0.2, -2.0, -3.0, -4.0]
IMAGE = params({"image.mean": [0.49, 0.48, 0.44], "image.std": [0.2, 0.19, 0.21]}).image
SIZE = 16


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    model = ImageClassifier("resnet20", 4, 1 / 30).train()
    with torch.no_grad():
        model(torch.randn(16, 3, SIZE, SIZE))  # changes the running statistics
        model.classifier.weight.mul_(torch.tensor([[3.0], [0.5], [1.0], [7.0]]))  # rows without unit norm
    return model.eval()


@pytest.fixture(scope="module")
def served(student):
    return ServedStudent(student, IMAGE.mean, IMAGE.std, LOG_PRIOR).eval()


@pytest.fixture(scope="module")
def graph(served):
    return to_onnx(served, SIZE, opset=20)


@pytest.fixture(scope="module")
def session(graph):
    return opened(graph)


def opened(graph):
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def request(batch):
    random = np.random.default_rng(batch)
    pixels = random.integers(0, 256, (batch, 3, SIZE, SIZE), dtype=np.uint8)
    strength = random.choice([0.0, 1.0, -0.5, 2.5], (batch, 1)).astype(np.float32)
    return pixels, strength


@torch.inference_mode()
def reference(student, pixels, strength):
    features, logits = student(normalise(torch.from_numpy(pixels), IMAGE))
    adjusted = adjust_logits(logits, torch.tensor(LOG_PRIOR), torch.from_numpy(strength))
    return adjusted.numpy(), (features / features.norm(dim=1, keepdim=True)).numpy()


def test_the_folded_graph_equals_model_normalisation_and_adjustment(student, served):
    pixels, strength = request(5)
    with torch.inference_mode():
        logits, feature = served(torch.from_numpy(pixels), torch.from_numpy(strength))
    expected, expected_feature = reference(student, pixels, strength)
    assert np.allclose(logits.numpy(), expected, rtol=0, atol=1e-4)
    assert np.allclose(feature.numpy(), expected_feature, rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", [LinearClassifier, CausalClassifier])
def test_another_classifier_is_folded_with_its_bias_and_the_shift_and_exported(head):
    torch.manual_seed(0)
    model = ImageClassifier("resnet20", 4, 1.0, head=head).train()
    with torch.no_grad():
        model(torch.randn(16, 3, SIZE, SIZE))  # the causal classifier needs a mean direction
    shift = [0.1, -0.2, 0.3, 0.4]
    served = ServedStudent(model.eval(), IMAGE.mean, IMAGE.std, LOG_PRIOR, shift).eval()
    pixels, strength = request(5)
    expected, expected_feature = reference(model, pixels, strength)
    expected = expected + np.array(shift, dtype=np.float32)
    logits, feature = opened(to_onnx(served, SIZE, opset=20)).run(None, {"image": pixels, "strength": strength})
    assert np.allclose(logits, expected, rtol=0, atol=1e-4) and np.allclose(
        feature, expected_feature, rtol=0, atol=1e-5
    )


def test_folding_does_not_change_the_student(student, served):
    assert not any(parameter.requires_grad is False for parameter in student.parameters())
    assert torch.allclose(served.class_matrix.norm(dim=1), torch.full((4,), 30.0), rtol=1e-5)


def test_the_file_has_all_weights_and_an_opset_that_every_triton_supports(graph):
    model = onnx.load_from_string(graph)
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version <= 10
    assert max(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")) <= 20
    assert {entry.domain for entry in model.opset_import} <= {"", "ai.onnx"}
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)


def test_the_file_contains_no_local_paths(graph):
    # A stack trace in a node would contain the paths of the checkout and of the libraries.
    texts = [str(Path(module.__file__).parent).encode() for module in (onnx, torch, sys.modules[to_onnx.__module__])]
    assert not any(text in graph for text in [*texts, str(ROOT).encode()])


def test_the_graph_has_the_expected_names_types_and_a_dynamic_batch(graph):
    model = onnx.load_from_string(graph)

    def signature(values):
        kinds = [(value.name, value.type.tensor_type) for value in values]
        return {name: (kind.elem_type, [d.dim_value or "any" for d in kind.shape.dim]) for name, kind in kinds}

    assert signature(model.graph.input) == {
        "image": (onnx.TensorProto.UINT8, ["any", 3, SIZE, SIZE]),
        "strength": (onnx.TensorProto.FLOAT, ["any", 1]),
    }
    assert signature(model.graph.output) == {
        "logits": (onnx.TensorProto.FLOAT, ["any", 4]),
        "feature": (onnx.TensorProto.FLOAT, ["any", 64]),
    }


@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_onnx_runtime_equals_pytorch_at_every_batch_size(session, student, batch):
    pixels, strength = request(batch)
    logits, feature = session.run(["logits", "feature"], {"image": pixels, "strength": strength})
    expected, expected_feature = reference(student, pixels, strength)
    assert logits.shape == (batch, 4) and feature.shape == (batch, 64)
    assert np.allclose(logits, expected, rtol=0, atol=2e-4) and np.allclose(
        feature, expected_feature, rtol=0, atol=1e-5
    )


def test_each_row_is_adjusted_by_its_own_strength(session):
    pixels = np.repeat(request(1)[0], 3, axis=0)
    logits = session.run(["logits"], {"image": pixels, "strength": np.array([[0], [1], [-2]], dtype=np.float32)})[0]
    assert np.allclose(logits[1] - logits[0], LOG_PRIOR, atol=1e-4)
    assert np.allclose(logits[2] - logits[0], np.multiply(-2, LOG_PRIOR), atol=1e-4)

"""A network with several experts as one ONNX graph: one trunk, the mean of the experts inside, float32 and float16."""

import collections

import numpy as np
import onnx
import pytest
import torch

from models.experts.backbone import expert_backbone
from models.networks.cosine_classifier import ImageClassifier
from pipeline.data.dataset import Images
from pipeline.onnx_export.float16 import to_float16
from pipeline.onnx_export.graph import ServedStudent, to_onnx
from pipeline.onnx_export.parity import TrainedNetwork, check_float16, check_parity
from pipeline.onnx_export.release import open_session
from tests.support.making import params

pytestmark = pytest.mark.slow

SIZE, CLASSES = 16, 4
RECIPE = params({"export.max_batch_size": 8})
LOG_PRIOR = [-0.2, -2.0, -3.0, -4.0]


def images(number=16):
    pixels = np.random.default_rng(1).integers(0, 256, (number, 3, SIZE, SIZE), dtype=np.uint8)
    names = [str(index) for index in range(number)]
    return Images(torch.from_numpy(pixels), torch.zeros(number, dtype=torch.int64), names, names, source=None)


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    model = ImageClassifier(expert_backbone("resnet20", 3, "early", narrow=True), CLASSES, 1 / 30).train()
    with torch.no_grad():
        model(torch.randn(16, 3, SIZE, SIZE))  # changes the running statistics
    return model.eval()


def served(model):
    return ServedStudent(model, RECIPE.image.mean, RECIPE.image.std, LOG_PRIOR).eval()


def network(model):
    return TrainedNetwork(model, RECIPE.image, LOG_PRIOR, [0.0] * CLASSES)


def test_experts_are_one_graph_with_one_trunk_and_the_outputs_of_pytorch(student):
    graph = to_onnx(served(student), SIZE, opset=20)
    nodes = collections.Counter(node.op_type for node in onnx.load_from_string(graph).graph.node)
    assert nodes["Conv"] == 1 + 6 + 3 * 12  # stem, first stage, and two stages for each expert
    assert nodes["Gemm"] + nodes["MatMul"] == 1  # one class matrix gives the mean of the experts
    session = open_session(graph)
    check_parity(session, network(student), images(), RECIPE.export, seed=0)
    logits, feature = session.run(
        None, {"image": images(2).images.numpy(), "strength": np.zeros((2, 1), dtype=np.float32)}
    )
    assert logits.shape == (2, CLASSES) and feature.shape == (2, 3 * 48)


def test_the_length_of_the_features_of_experts_stays_float32_in_a_float16_graph(student):
    half = to_float16(served(student), SIZE, opset=20)
    sessions = open_session(half.served), open_session(half.rounding)
    assert check_float16(half, sessions, network(student), images(), RECIPE.export, seed=0).agreement >= 0.98
    nodes = onnx.load_from_string(half.served).graph.node
    lengths = [node.input[0] for node in nodes if node.op_type == "ReduceL2" and node.input[0].startswith("backbone")]
    casts = {node.output[0]: node.attribute[0].i for node in nodes if node.op_type == "Cast"}
    assert [casts[name] for name in lengths] == [onnx.TensorProto.FLOAT]

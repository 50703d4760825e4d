"""The ONNX graph with its backbone in float16: parts that stay float32, deviation from PyTorch, rejected networks."""

import json
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper, shape_inference
from torch import nn

from models.networks.cosine_classifier import ImageClassifier
from pipeline.data.class_prior import Prior
from pipeline.data.dataset import Images, normalise
from pipeline.onnx_export.float16 import FLOAT16_MAX, Float16Graph, to_float16
from pipeline.onnx_export.graph import ServedStudent, to_onnx
from pipeline.onnx_export.parity import Parity, TrainedNetwork, check_float16
from pipeline.onnx_export.release import golden_tolerance, open_session
from pipeline.shared.errors import StageError
from tests.support.making import params

pytestmark = pytest.mark.slow

SIZE = 16
P = [0.8, 0.1, 0.07, 0.03]
PRIOR = Prior(["a", "b", "c", "d"], [80, 10, 7, 3], P, np.log(P).tolist(), ["medium", "few", "few", "few"])
IMAGE = params().image


class AttentionBackbone(nn.Module):
    """A backbone with operations unsuited to float16: a layer norm and a softmax between its matrix products."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.inner = nn.Linear(8, 8)
        with torch.no_grad():
            self.inner.weight.mul_(scale)

    def forward(self, images):
        rows = self.norm(self.patches(images).flatten(2).transpose(1, 2))
        weights = torch.softmax(self.inner(rows) @ rows.transpose(1, 2), dim=2)
        return (weights @ rows).mean(1)


class ScalingBackbone(nn.Module):
    """Backbone of three multiplications and additions, each rounded in float16."""

    def forward(self, images):
        return (images.flatten(1)[:, :8] * 0.3333 + 0.7) * 1.7


def resnet():
    torch.manual_seed(0)
    model = ImageClassifier("resnet20", len(P), 1 / 30).train()
    with torch.no_grad():
        model(torch.randn(16, 3, SIZE, SIZE))  # changes the running statistics
    return model.eval()


def attention_model(scale=1.0):
    torch.manual_seed(0)
    model = ImageClassifier("resnet20", len(P), 1 / 30)
    model.backbone = AttentionBackbone(scale)
    model.classifier.weight = nn.Parameter(torch.randn(len(P), 8))
    return model.eval()


def export_float16(model):
    return to_float16(ServedStudent(model, IMAGE.mean, IMAGE.std, PRIOR.log_prior).eval(), SIZE, opset=20)


def random_images(number):
    pixels = np.random.default_rng(1).integers(0, 256, (number, 3, SIZE, SIZE), dtype=np.uint8)
    names = [str(index) for index in range(number)]
    return Images(torch.from_numpy(pixels), torch.zeros(number, dtype=torch.int64), names, names, source=None)


def check(half, model, examples=None, **bounds):
    recipe = params({"export.max_batch_size": 16, **{f"export.half.{key}": value for key, value in bounds.items()}})
    sessions = (open_session(half.served), open_session(half.rounding))
    network = TrainedNetwork(model, IMAGE, PRIOR.log_prior, [0.0] * len(P))
    return check_float16(half, sessions, network, examples or random_images(40), recipe.export, recipe.seed)


@pytest.fixture(scope="module")
def student():
    return resnet()


@pytest.fixture(scope="module")
def half(student):
    return export_float16(student)


@pytest.fixture(scope="module")
def small():
    model = attention_model()
    return model, export_float16(model)


def test_inputs_and_outputs_are_those_of_the_float32_graph(student, half):
    whole = onnx.load_from_string(half.served)
    onnx.checker.check_model(whole, full_check=True)
    assert whole.ir_version <= 10 and [(o.domain, o.version) for o in whole.opset_import] == [("", 20)]
    served = ServedStudent(student, IMAGE.mean, IMAGE.std, PRIOR.log_prior).eval()
    full = onnx.load_from_string(to_onnx(served, SIZE, opset=20))

    def signature(graph):
        kinds = [(value.name, value.type.tensor_type) for value in (*graph.input, *graph.output)]
        return [(name, kind.elem_type, [d.dim_value for d in kind.shape.dim]) for name, kind in kinds]

    assert signature(whole.graph) == signature(full.graph)
    assert len(half.served) < 0.55 * full.ByteSize()


def test_the_backbone_is_float16_and_normalisation_classifier_scale_and_prior_are_not(half):
    graph = onnx.load_from_string(half.served).graph
    kinds = {t.name: t.data_type for t in graph.initializer if t.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)}
    full = {name.rpartition(".")[2] for name, kind in kinds.items() if kind == TensorProto.FLOAT}
    assert {"scale", "shift", "class_matrix", "log_prior"} <= full
    assert {name.partition("/")[0] for name, kind in kinds.items() if kind == TensorProto.FLOAT16} == {"backbone"}
    assert not [name for name in kinds if name.startswith("backbone/") and kinds[name] == TensorProto.FLOAT]


def test_no_value_after_the_backbone_is_rounded_to_float16(half):
    """A difference in the seventh digit of a class-matrix row changes the logit, which float16 would round away."""
    whole = onnx.load_from_string(half.served)
    pixels = random_images(8).images.numpy()
    before = answers(half.served, pixels)
    matrix = next(tensor for tensor in whole.graph.initializer if tensor.name.endswith("class_matrix"))
    matrix.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(matrix) * np.float32(1 + 2e-6), matrix.name))
    assert not np.array_equal(answers(whole.SerializeToString(), pixels), before)
    half_values = before.astype(np.float16).astype(np.float32)
    assert not np.array_equal(half_values, before)


def test_norm_and_softmax_inside_a_backbone_stay_float32(small):
    whole = shape_inference.infer_shapes(onnx.load_from_string(small[1].served))
    kinds = {value.name: value.type.tensor_type.elem_type for value in whole.graph.value_info}
    dtypes = {node.op_type: kinds[node.output[0]] for node in whole.graph.node if node.output[0] in kinds}
    assert dtypes["Softmax"] == dtypes["LayerNormalization"] == dtypes["Gemm"] == TensorProto.FLOAT
    assert dtypes["Conv"] == TensorProto.FLOAT16
    onnx.checker.check_model(whole, full_check=True)


def test_float16_is_close_to_pytorch_but_not_equal(half, student, small):
    for graph, model in ((half, student), (small[1], small[0])):
        parity = check(graph, model)
        assert 1e-5 < parity.logit < 0.06 and parity.agreement > 0.9 and parity.images == 40


def test_the_rounding_graph_rounds_every_node_as_numpy_does_and_a_cpu_does_not():
    model = attention_model()
    model.backbone = ScalingBackbone()
    half = export_float16(model)
    pixels = random_images(6).images
    values = (pixels.float() / 127.5 - 1).flatten(1)[:, :8].numpy().astype(np.float16)
    values = (values * np.float16(0.3333) + np.float16(0.7)) * np.float16(1.7)
    assert values.dtype == np.float16
    expected = values.astype(np.float32) / np.linalg.norm(values.astype(np.float32), axis=1, keepdims=True)
    feeds = {"image": pixels.numpy(), "strength": np.zeros((6, 1), dtype=np.float32)}
    rounding, served = (open_session(graph).run(["feature"], feeds)[0] for graph in (half.rounding, half.served))
    assert np.abs(rounding - expected).max() < 1e-6 < np.abs(served - expected).max()


def test_a_difference_above_the_tolerance_is_refused_with_both_values(small):
    with pytest.raises(StageError) as caught:
        check(small[1], small[0], tolerance=1e-6)
    message = str(caught.value)
    assert message.startswith("at batch size 1 float16 differs from PyTorch by ") and "\n" not in message
    assert (
        "above export.half.tolerance = 1e-06; keep export.precision at float32, or raise the tolerance; nothing"
        in message
    )
    assert caught.value.exit_code == 1


def test_an_agreement_below_the_bound_is_refused_with_both_values(small):
    model, _ = small
    near = random_images(200)
    near.images[:] = near.images[:1]
    near.images.flatten(1)[range(200), range(200)] ^= 1  # differences below float16's precision
    with torch.inference_mode():
        middle = nn.functional.normalize(model(normalise(near.images, IMAGE))[0], dim=1).mean(0)
        aside = torch.randn(8)
        aside -= middle * (aside @ middle) / (middle @ middle)
        model = attention_model()
        model.classifier.weight = nn.Parameter(
            torch.stack([middle + aside, middle - aside, -middle, -middle]), requires_grad=False
        )
    with pytest.raises(StageError) as caught:
        check(export_float16(model), model, near, agreement=1.0)
    assert re.fullmatch(
        r"float16 gives \d+ of 200 images another best class than PyTorch, 0\.\d+ keep theirs, below "
        r"export\.half\.agreement = 1; keep export\.precision at float32; nothing was exported",
        str(caught.value),
    )


def test_a_weight_beyond_float16_is_refused_by_name():
    model = attention_model()
    with torch.no_grad():
        model.backbone.patches.weight[0, 0, 0, 0] = 1e6
    with pytest.raises(
        StageError, match=r"weight patches\.weight of the backbone has the value 1e\+06, beyond .* 65504; keep"
    ):
        export_float16(model)


def test_an_activation_beyond_float16_is_refused_although_a_cpu_does_not_overflow():
    model = attention_model(scale=1e5)  # every weight is in float16's range, the products are not
    assert model.backbone.inner.weight.abs().max() < FLOAT16_MAX
    half = export_float16(model)
    pixels = random_images(4).images.numpy()
    assert np.isfinite(answers(half.served, pixels)).all()
    with pytest.raises(
        StageError, match=r"^(Add|Gemm|MatMul) \S+ reaches \d\S+ in the backbone, beyond float16's largest"
    ):
        check(half, model)


def test_a_nan_counts_as_beyond_float16():
    with pytest.raises(StageError, match="Relu second reaches nan in the backbone"):
        Float16Graph(b"", b"", ["Conv first", "Relu second"]).check_magnitude(np.array([1.0, np.nan], dtype=np.float32))


def test_the_golden_tolerance_is_larger_for_float16():
    assert golden_tolerance(None) == 0.002
    assert golden_tolerance(Parity(0.01, 1.0, 40)) == pytest.approx(0.012)
    assert golden_tolerance(Parity(5.0, 1.0, 40)) == 0.1


def test_the_float16_converter_does_not_change_sys_path():
    code = (
        "import json, sys; import onnx; from pipeline.onnx_export.float16 import convert_to_float16;"
        "before = list(sys.path); m = onnx.parser.parse_model("
        "'<ir_version: 10, opset_import: [\"\": 20]> g (float[2] pixels) => (float[2] features) {features = Relu(pixels)}');"
        "half = convert_to_float16(m); print(json.dumps([before == sys.path, [n.op_type for n in half.graph.node]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [True, ["Cast", "Relu", "Cast"]]


def answers(graph, pixels):
    strength = np.zeros((len(pixels), 1), dtype=np.float32)
    return open_session(graph).run(["logits"], {"image": pixels, "strength": strength})[0]

"""Reasons of an answer, on a fake of Triton's backend: nearest training images and activation maps, against numpy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import CLASSES, FEATURE_DIM, SIZE, Release, picture, run_graph, write_export
from onnx import TensorProto, helper, numpy_helper

from models.preprocess import preprocess
from pipeline.onnx_export.explanations import packed, with_class, write_arrays
from serving.client import Extras
from serving.client.extras import EXPLAIN
from serving.client.predictions import NearestImage, extra_parts
from serving.client.requests import image_call
from serving.repository.manifest import EXPLAIN_NAME, MANIFEST_NAME, STUDENT_NAME, Manifest, sha256_of
from serving.repository.writer import publish, write_repository
from serving.shared.errors import InputError, RepositoryError
from serving.transport.messages import Answer
from tests.support.stand_in import Response, Tensor, TritonModelException, backend, load, request

RANDOM = np.random.default_rng(7)
ROWS = RANDOM.normal(size=(40, FEATURE_DIM))
ROWS = (ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)).astype(np.float16)
LABELS = RANDOM.integers(0, len(CLASSES), 40).astype(np.int32)
NAMES = [f"train/ü{number}.jpg" for number in range(40)]
CELLS = np.array([[0.0, 1.0], [1.0, 2.0]], dtype=np.float32)  # its mean is 1


def add_map(path: Path) -> np.ndarray:
    """Add the output feature_map to the tiny graph: its mean is the feature before normalisation. Returns the class matrix."""
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(CELLS[None, None], "cells"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 3], dtype=np.int64), "sides"))
    model.graph.node.append(helper.make_node("Unsqueeze", ["projected", "sides"], ["column"]))
    model.graph.node.append(helper.make_node("Mul", ["column", "cells"], ["feature_map"]))
    model.graph.output.append(
        helper.make_tensor_value_info("feature_map", TensorProto.FLOAT, ["B", FEATURE_DIM, *CELLS.shape])
    )
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return next(numpy_helper.to_array(each) for each in model.graph.initializer if each.name == "weights").T


def explained_export(folder: Path, thumbnails: bool = True, **keys: Any) -> Release:
    """An export with a feature index of 40 rows and with a map."""
    manifest = write_export(folder, **keys)
    arrays = {"rows": ROWS, "row_class": LABELS, **packed("names", [name.encode() for name in NAMES])}
    arrays |= {"matrix": add_map(folder / STUDENT_NAME), "unit": np.array(True)}
    if thumbnails:
        arrays |= packed("thumbnails", [b"jpeg %d" % number for number in range(40)])
    explain = write_arrays(folder, arrays, CELLS.shape)
    files = manifest.files | {name: sha256_of(folder / name) for name in (STUDENT_NAME, EXPLAIN_NAME)}
    manifest = Manifest.model_validate(manifest.model_dump() | {"files": files, "explain": explain.model_dump()})
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json())
    return Release(folder, manifest)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Release, Path]:
    folder = tmp_path_factory.mktemp("explain")
    made = explained_export(folder / "export")
    return made, write_repository(made.export_dir, folder / "repository")


@pytest.fixture
def repository(made: tuple[Release, Path]) -> Path:
    return made[1]


def asking(images: list[bytes], numbers: list[int], **inputs: object) -> Response:
    built = request(images, **inputs)
    built.tensors.append(Tensor("explain", np.array(numbers, dtype=np.uint8)[:, None]))
    return built


def test_nearest_images_and_map_are_those_of_numpy(classifier: Any, made: tuple[Release, Path], calls: list) -> None:
    images, numbers = [picture(seed) for seed in range(10)], [3, 0, 20, 1, 5, 5, 5, 5, 5, 2]
    [response] = classifier.execute([asking(images, numbers, strength=[[0.0]] * 10)])
    assert response.error is None
    pixels = [preprocess(image, SIZE, SIZE) for image in images]
    logits, feature = run_graph(made[0].export_dir / STUDENT_NAME, pixels, 0.0)
    cosines = feature.astype(np.float64) @ ROWS.astype(np.float64).T
    for row, number in enumerate(numbers):
        order = np.argsort(-cosines[row])[:number]
        assert [name.decode() for name in response["nearest"][row] if name] == [NAMES[index] for index in order]
        assert [name.decode() for name in response["nearest_class"][row] if name] == [CLASSES[LABELS[i]] for i in order]
        np.testing.assert_allclose(response["nearest_cosine"][row][:number], cosines[row][order], atol=1e-6)
        assert [file for file in response["nearest_image"][row] if file] == [b"jpeg %d" % index for index in order]
        # The map of the best class has its balanced logit as mean, and the form of the graph's map.
        np.testing.assert_allclose(response["activation_map"][row], logits[row].max() * CELLS, rtol=1e-4)
    assert response["activation_crop"].tolist() == [[1.0]] * 10
    assert response["nearest"].shape == (10, 20) and response["activation_map"].shape == (10, *CELLS.shape)
    assert [rows for *_, rows in calls] == [8, 2, 8, 2]  # one more run of the network


def test_the_map_is_of_the_best_class_under_the_prior_of_the_request(
    classifier: Any, made: tuple[Release, Path]
) -> None:
    prior = np.array([[0, 0, 0, 0, 1.0]])
    [response] = classifier.execute([asking([picture(3)], [1], target_prior=prior)])
    [logits] = made[0].logits([picture(3)])
    np.testing.assert_allclose(response["activation_map"][0].mean(), logits[4], rtol=1e-4)


def test_a_request_without_explain_gets_identical_bytes_beside_one_with_it(classifier: Any) -> None:
    images = [picture(seed) for seed in range(3)]
    [alone] = classifier.execute([request(images, strength=[[1.0]] * 3)])
    plain, explained, zero = classifier.execute(
        [request(images, strength=[[1.0]] * 3), asking([picture(9)], [5], strength=[[1.0]]), asking(images, [0] * 3)]
    )
    today = ["class", "index", "probability"]
    assert [tensor.name for tensor in plain.tensors] == [tensor.name for tensor in zero.tensors] == today
    assert [tensor.name for tensor in explained.tensors] == [*today, *EXPLAIN]
    for name in today:
        assert alone[name].tolist() == plain[name].tolist()


def test_a_number_above_the_limit_and_a_release_without_reasons_are_refused(
    classifier: Any, release: Release, tmp_path: Path
) -> None:
    [response] = classifier.execute([asking([picture(1)], [21])])
    assert response.error.message() == "explain is 21; expected a number from 0 to 20"
    root = write_repository(release.export_dir, tmp_path / "plain")
    plain = load(root, "classifier", "configs/local.pbtxt", backend())
    [response] = plain.execute([asking([picture(1)], [1])])
    assert "this release has no reasons; set serving.explain" in response.error.message()
    plain.finalize()


@pytest.mark.parametrize("fault", ["graph", "changed", "missing"])
def test_an_index_that_is_not_of_the_version_is_refused(made: tuple[Release, Path], tmp_path: Path, fault: str) -> None:
    root = shutil.copytree(made[1], tmp_path / "repository")
    path, manifest = (root / "classifier/1" / name for name in (EXPLAIN_NAME, MANIFEST_NAME))
    expected = {"changed": "sha256 is", "missing": "No such file"}.get(
        fault, "is the feature index of graph 000000000000"
    )
    if fault == "missing":
        path.unlink()
    else:
        with np.load(path) as archive:
            arrays = dict(archive.items()) | {"graph": np.array(b"0" * 64)}
        np.savez(path, **arrays)
    if fault == "graph":
        content = json.loads(manifest.read_text())
        content["files"][EXPLAIN_NAME] = sha256_of(path)
        manifest.write_text(json.dumps(content))
    with pytest.raises(TritonModelException, match=expected) as refused:
        load(root, "classifier", "configs/local.pbtxt", backend())
    assert "\n" not in str(refused.value)


def test_publishing_refuses_an_index_of_another_graph_and_a_repository_without_the_map(
    made: tuple[Release, Path], release: Release, tmp_path: Path
) -> None:
    root = write_repository(release.export_dir, tmp_path / "plain")
    with pytest.raises(RepositoryError, match="has a feature_map, but"):
        publish(made[0].export_dir, root)
    export = shutil.copytree(made[0].export_dir, tmp_path / "export")
    with np.load(export / EXPLAIN_NAME) as archive:
        np.savez(tmp_path / "other.npz", **dict(archive.items()) | {"graph": np.array(b"0" * 64)})
    shutil.copyfile(tmp_path / "other.npz", export / EXPLAIN_NAME)
    files = made[0].manifest.files | {EXPLAIN_NAME: sha256_of(export / EXPLAIN_NAME)}
    (export / MANIFEST_NAME).write_text(made[0].manifest.model_copy(update={"files": files}).model_dump_json())
    with pytest.raises(RepositoryError, match="is the feature index of graph 000000000000"):
        write_repository(export, tmp_path / "repository")


def test_the_client_sends_a_number_and_reads_images_and_map() -> None:
    assert Extras(explain=True).inputs(None)["explain"].tolist() == [5]
    assert Extras(explain=False).inputs(None) == Extras().inputs(None) == {}
    for wrong in (-1, 21, "yes", 2.5):
        with pytest.raises(InputError, match="expected True or a number of images from 1 to 20"):
            Extras(explain=wrong)  # type: ignore[arg-type]
    call = image_call([b""], "prior", None, None, Extras(explain=2).inputs(None))
    assert set(EXPLAIN) == set(call.optional) and call.inputs["explain"].dtype == np.uint8
    outputs = {
        "nearest": np.array([[b"a.jpg", b""]], dtype=object), "nearest_class": np.array([[b"ant", b""]], dtype=object),
        "nearest_cosine": np.array([[0.5, 0.0]], dtype=np.float32), "activation_map": np.array([[[0.5, 1.5]]]),
        "activation_crop": np.array([[0.875]], dtype=np.float32),
    }  # fmt: skip
    assert extra_parts(Answer(outputs, 1), 0) == {
        "nearest": (NearestImage("a.jpg", "ant", 0.5),), "activation_map": ((0.5, 1.5),),
        "activation_crop": 0.875,
    }  # fmt: skip


def test_an_added_class_has_its_row_and_its_images_in_the_index(made: tuple[Release, Path]) -> None:
    row, features = np.ones(FEATURE_DIM), ROWS[:2]
    arrays = with_class(made[0].export_dir / EXPLAIN_NAME, 2, "new", row, features)
    assert arrays["matrix"].shape == (len(CLASSES) + 1, FEATURE_DIM) and arrays["matrix"][2].tolist() == row.tolist()
    larger = [CLASSES[0], CLASSES[1], "new", *CLASSES[2:]]
    assert [larger[index] for index in arrays["row_class"]] == [*(CLASSES[label] for label in LABELS), "new", "new"]
    names = arrays["names"].tobytes()
    assert names[arrays["names_ends"][39] :] == b"new 1new 2"
    assert len(arrays["thumbnails_ends"]) == len(arrays["rows"]) == 42

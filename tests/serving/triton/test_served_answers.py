"""Predictions of the real server against ONNX Runtime and numpy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, MAX_BATCH_SIZE, SIZE, TAU_S, TOP_K, Release, picture, run_graph

from models.preprocess import preprocess
from serving.client.sync_client import Client, Prediction
from serving.server.triton_server import TritonServer
from serving.shared.errors import InputError
from serving.transport.sync_transport import RequestRejected, Transport
from tests.support.container import backends
from tests.support.held_requests import answers_at_once

pytestmark = pytest.mark.end_to_end

VECTOR = [0.05, 0.05, 0.1, 0.3, 0.5]


@pytest.fixture(params=["http", "grpc"])
def client(server: TritonServer, request: pytest.FixtureRequest) -> Iterator[Client]:
    with Client(server.http_url if request.param == "http" else server.grpc_url) as connected:
        yield connected


@pytest.fixture(params=["http", "grpc"])
def transport(server: TritonServer, request: pytest.FixtureRequest) -> Iterator[Transport]:
    opened = Transport(server.http_url if request.param == "http" else server.grpc_url, timeout=30)
    yield opened
    opened.close()


def assert_answers(predictions: list[Prediction], expected: np.ndarray) -> None:
    assert len(predictions) == len(expected)
    for answer, p in zip(predictions, expected, strict=True):
        best = np.argsort(-p, kind="stable")[:TOP_K]
        assert list(answer.indexes) == best.tolist()
        assert list(answer.classes) == [CLASSES[index] for index in best]
        np.testing.assert_allclose(answer.probabilities, p[best], rtol=1e-4, atol=1e-6)


def test_student_returns_the_outputs_of_onnx_runtime(transport: Transport, release: Release) -> None:
    images = [preprocess(picture(seed), SIZE, SIZE) for seed in range(5)]
    for strength in (0.0, 1.0, -2.5):
        inputs = {"image": np.stack(images), "strength": np.full((5, 1), strength, dtype=np.float32)}
        answered, version = transport.infer("student", inputs, {"logits": 0, "feature": 0})
        logits, feature = run_graph(release.export_dir / "student.onnx", images, strength)
        np.testing.assert_allclose(answered["logits"], logits, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(answered["feature"], feature, rtol=1e-5, atol=1e-6)
        assert version == 1


@pytest.mark.parametrize("strength", [0.0, 1.0, 0.3, -1.0])
def test_classifier_adjusts_logits_as_the_student_does(client: Client, release: Release, strength: float) -> None:
    images = [picture(seed) for seed in range(3)]
    logits = release.logits(images, strength).astype(np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert_answers(client.predict(images, strength), expected)


def test_every_form_of_a_prior_equals_numpy(client: Client, release: Release, tmp_path: Path) -> None:
    log_prior = np.log(np.array(release.manifest.counts) / sum(release.manifest.counts))
    (tmp_path / "list.json").write_text(json.dumps(VECTOR))
    (tmp_path / "names.json").write_text(json.dumps(dict(zip(CLASSES, VECTOR, strict=True))))
    (tmp_path / "lines.txt").write_text("\n".join(map(str, VECTOR)))
    images = [picture(seed) for seed in range(4)]
    adjustments = [
        ("balanced", 0 * log_prior),
        ("train", log_prior),
        ("0.3", 0.3 * log_prior),
        (-1.5, -1.5 * log_prior),
        (None, release.manifest.strength * log_prior),
        (VECTOR, np.log(VECTOR)),
        (tmp_path / "list.json", np.log(VECTOR)),
        (str(tmp_path / "names.json"), np.log(VECTOR)),
        (tmp_path / "lines.txt", np.log(VECTOR)),
    ]
    for prior, adjustment in adjustments:
        assert_answers(client.predict(images, prior), release.probabilities(images, adjustment))


def test_a_missing_strength_is_the_default_of_the_manifest(
    transport: Transport, release: Release, client: Client
) -> None:
    inputs = {"image": np.array([[picture(5)]], dtype=np.object_)}
    answered, _ = transport.infer("classifier", inputs, {"index": 0, "probability": 0})
    expected = client.predict([picture(5)], release.manifest.strength)[0]
    assert answered["index"][0].tolist() == list(expected.indexes)
    np.testing.assert_allclose(answered["probability"][0], expected.probabilities, rtol=1e-6)


def test_the_training_prior_as_a_vector_equals_strength_1(client: Client, release: Release) -> None:
    prior = np.array(release.manifest.counts) / sum(release.manifest.counts)
    images = [picture(seed) for seed in range(3)]
    for vector, strength in zip(client.predict(images, prior), client.predict(images, "train"), strict=True):
        assert vector.indexes == strength.indexes
        np.testing.assert_allclose(vector.probabilities, strength.probabilities, rtol=1e-4)


def test_http_and_grpc_return_the_same_predictions(server: TritonServer) -> None:
    images = [picture(seed) for seed in range(10)]
    with Client(server.http_url) as http, Client(server.grpc_url) as grpc:
        for prior in ("balanced", "train", VECTOR):
            assert http.predict(images, prior) == grpc.predict(images, prior)


def test_more_images_than_a_batch_are_returned_in_order(client: Client, release: Release) -> None:
    images = [picture(seed) for seed in range(2 * MAX_BATCH_SIZE + 3)]
    assert_answers(client.predict(images, "balanced"), release.probabilities(images, np.zeros(len(CLASSES))))


def test_40_concurrent_requests_get_their_own_predictions(server: TritonServer, release: Release) -> None:
    log_prior = np.array(release.manifest.log_prior)

    def ask(index: int) -> list[Prediction]:
        # A client per thread: the HTTP one may not be shared.
        with Client(server.http_url if index % 2 else server.grpc_url) as own:
            return own.predict([picture(index)], VECTOR if index % 5 == 0 else index / 20)

    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(ask, range(40)))
    for index, answer in enumerate(answers):
        adjustment = np.log(VECTOR) if index % 5 == 0 else index / 20 * log_prior
        assert_answers(answer, release.probabilities([picture(index)], adjustment))


def test_200_requests_in_flight_get_the_predictions_of_single_requests(server: TritonServer) -> None:
    random = np.random.default_rng(0)
    priors = ["balanced", "train", *random.normal(size=40).round(3), *random.dirichlet(np.ones(len(CLASSES)), 40)]
    requests = [(picture(index % 16), priors[int(random.integers(len(priors)))]) for index in range(200)]
    with Client(server.grpc_url) as client:
        single = [client.predict([image], prior)[0] for image, prior in requests]
        calls = [client.request([image], prior) for image, prior in requests]
    http_port, grpc_port = (int(url.rpartition(":")[2]) for url in (server.http_url, server.grpc_url))
    together = answers_at_once(http_port, grpc_port, calls)
    assert len({answer.probabilities for answer in single}) > 100  # the priors have an effect
    for response, answer in zip(together, single, strict=True):
        assert tuple(name.decode() for name in response.outputs["class"][0]) == answer.classes
        np.testing.assert_allclose(response.outputs["probability"][0], answer.probabilities, rtol=1e-4, atol=1e-6)


def test_every_finite_strength_has_finite_probabilities(client: Client) -> None:
    for strength in (3e38, -3e38, 1e-38):
        answer = client.predict([picture(1)], strength)[0]
        assert np.isfinite(answer.probabilities).all()
    assert client.predict([picture(1)], 3e38)[0].indexes[0] == 0  # the most frequent class
    assert client.predict([picture(1)], -3e38)[0].indexes[0] == len(CLASSES) - 1


def test_a_class_of_probability_0_ranks_last_without_nan(client: Client) -> None:
    answer = client.predict([picture(1)], [0.0, 0.0, 0.0, 0.0, 1.0])[0]
    assert answer.indexes[0] == 4
    assert np.isfinite(answer.probabilities).all()


def test_client_returns_the_class_names_in_order(client: Client) -> None:
    assert client.class_names() == CLASSES


def test_no_images_need_no_server() -> None:
    with Client("http://127.0.0.1:9") as client:
        assert client.predict([]) == []


def rows(images: list[bytes], **inputs: object) -> dict[str, np.ndarray]:
    encoded = {"image": np.array(images, dtype=np.object_).reshape(-1, 1)}
    return encoded | {name: np.asarray(value, dtype=np.float32) for name, value in inputs.items()}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (rows([b"GIF89a nonsense"]), "image is not a JPEG, PNG or WebP image"),
        (rows([b""]), "image is empty"),
        (rows([picture(1), picture(2)[:70]]), "row 1: image is damaged or truncated"),
        (rows([picture(1)], strength=[[np.nan]]), "strength is nan; expected a finite number"),
        (rows([picture(1)] * 2, strength=[[0.0], [np.inf]]), "row 1: strength is inf"),
        (rows([picture(1)], target_prior=[[-0.5, 0.5, 0.5, 0.5, 0.0]]), "target_prior has a negative entry"),
        (rows([picture(1)], target_prior=[[0.5, 0.1, 0.1, 0.1, 0.1]]), "target_prior sums to 0.9"),
        (rows([picture(1)], target_prior=[[np.nan, 1, 0, 0, 0]]), "target_prior has an entry that is not finite"),
        (rows([picture(1)], target_prior=[[0.5, 0.5]]), "target_prior"),
        (rows([picture(1)], target_prior=[VECTOR], strength=[[0.0]]), "strength and target_prior exclude each other"),
    ],
)
def test_an_invalid_request_is_rejected_naming_the_input(
    transport: Transport, inputs: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(RequestRejected, match=message) as caught:
        transport.infer("classifier", inputs, {"class": 0, "index": 0, "probability": 0})
    assert "Traceback" not in str(caught.value)
    assert ".py" not in str(caught.value)


def test_student_rejects_a_strength_that_is_not_finite_except_in_a_container(transport: Transport) -> None:
    image = preprocess(picture(1), SIZE, SIZE)[None]
    for strength, message in ((np.nan, "strength holds a number that is not finite"), (3e38, "not finite")):
        inputs = {"image": image, "strength": np.array([[strength]], dtype=np.float32)}
        if backends():
            assert not np.isfinite(transport.infer("student", inputs, {"logits": 0})[0]["logits"]).all()
            continue
        with pytest.raises(RequestRejected, match=message):
            transport.infer("student", inputs, {"logits": 0})


def test_invalid_requests_do_not_fail_others_of_the_batch(server: TritonServer, release: Release) -> None:
    def ask(index: int) -> Prediction | str:
        own = Transport(server.grpc_url, timeout=30)
        bad = index % 4 == 0
        try:
            inputs = rows([b"broken" if bad else picture(index)], strength=[[0.0]])
            answered, version = own.infer("classifier", inputs, {"class": 0, "index": 0, "probability": 0})
        except RequestRejected as error:
            return str(error)
        finally:
            own.close()
        names = tuple(name.decode() for name in answered["class"][0])
        return Prediction(names, tuple(answered["index"][0]), tuple(answered["probability"][0]), version)

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(48)))
    for index, answer in enumerate(answers):
        if index % 4 == 0:
            assert isinstance(answer, str)
            assert "image is not a JPEG, PNG or WebP image" in answer
        else:
            assert_answers([answer], release.probabilities([picture(index)], np.zeros(len(CLASSES))))


def test_client_rejects_a_vector_of_another_length(client: Client) -> None:
    with pytest.raises(InputError, match="expected 5 numbers, one per class"):
        client.predict([picture(1)], [0.5, 0.5])


def test_cosine_logits_are_bounded_by_the_temperature(transport: Transport) -> None:
    image = preprocess(picture(1), SIZE, SIZE)[None]
    inputs = {"image": image, "strength": np.zeros((1, 1), dtype=np.float32)}
    answered, _ = transport.infer("student", inputs, {"logits": 0, "feature": 0})
    assert np.abs(answered["logits"]).max() <= 1 / TAU_S + 1e-4
    np.testing.assert_allclose(np.linalg.norm(answered["feature"]), 1, rtol=1e-5)

"""The two Python-backend models called directly, one batch at a time, with Triton's Python module faked.

The real server forms its batches dynamically; here a batch contains exactly the requests that a test puts in it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CLASSES, MAX_BATCH_SIZE, Release, picture
from PIL import Image

from serving.repository.manifest import sha256_of
from serving.repository.writer import write_repository
from serving.server.local_tree import link_tree
from tests.support.stand_in import Response, Tensor, TritonError, TritonModelException, backend, load, request


@pytest.fixture
def classifier_with_network(repository: Path) -> Iterator[Any]:
    """The classifier as in the local server with a small network: it runs the network itself, without calls."""
    model = load(repository, "classifier", "configs/local.pbtxt", backend())
    yield model
    model.finalize()


def named(images: list[bytes], *priors: bytes) -> Response:
    encoded = [np.array(texts, dtype=np.object_).reshape(-1, 1) for texts in (images, priors)]
    return Response([Tensor("image", encoded[0]), Tensor("prior", encoded[1])])


def test_mixed_strengths_of_one_batch_run_the_student_once(classifier: Any, calls: list, release: Release) -> None:
    log_prior = np.array(release.manifest.log_prior)
    strengths = [0.0, 1.0, -0.5, 0.3]
    answers = classifier.execute([request([picture(seed)], strength=[[s]]) for seed, s in enumerate(strengths)])
    assert calls == [("student", 1, 4)]
    for seed, (answer, strength) in enumerate(zip(answers, strengths, strict=True)):
        expected = release.probabilities([picture(seed)], strength * log_prior)[0]
        np.testing.assert_allclose(answer["probability"][0], np.sort(expected)[::-1][:3], rtol=1e-4)


def test_every_kind_of_prior_shares_a_batch_as_text(classifier: Any, calls: list, release: Release) -> None:
    log_prior, own = np.array(release.manifest.log_prior), [0.5, 0.2, 0.1, 0.1, 0.1]
    kinds = {
        b"balanced": np.zeros(len(CLASSES)),
        b"train": log_prior,
        b"-0.5": -0.5 * log_prior,
        json.dumps(own).encode(): np.log(own),
    }
    images = [picture(seed) for seed in range(len(kinds))]
    [together] = classifier.execute([named(images, *kinds)])
    alone = classifier.execute([named([image], text) for image, text in zip(images, kinds, strict=True)])
    assert [rows for _, _, rows in calls] == [4, 4]
    for place, (image, added) in enumerate(zip(images, kinds.values(), strict=True)):
        expected = release.probabilities([image], added)[0]
        for found in (together["probability"][place], alone[place]["probability"][0]):
            np.testing.assert_allclose(found, np.sort(expected)[::-1][:3], rtol=1e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "prior is ''; expected balanced, train, live, a number, or a list"),
        (b"trian", "prior is 'trian'; expected balanced"),
        (b"nan", "prior is 'nan'; expected balanced"),
        (b"1e39", "prior is '1e39'; expected balanced"),
        (b"1_0", "prior is '1_0'; expected balanced"),
        (b" 1", "prior is ' 1'; expected balanced"),
        ("\u0661".encode(), "expected balanced"),
        (b"1" * 100_000, "prior is '1111111111111111111111111111111111111111'; expected balanced"),
        (b"\xff\n", "prior is '\\ufffd\\n'; expected balanced"),
        (b"[0.5, 0.5]", "prior has shape [2]; expected 5 numbers"),
        (b"[0.5, 0.5, 0.5, 0, 0]", "prior sums to 1.5"),
        (b"[1, 0, 0, 0, NaN]", "prior has an entry that is not finite"),
        (b"[2, -1, 0, 0, 0]", "prior has a negative entry"),
        (b"[1, 0, 0, 0", "prior is '[1, 0, 0, 0', no list of numbers; expected"),
        (b'["1", 0, 0, 0, "x"]', "no list of numbers"),
        (b"[[1, 0, 0, 0, 0]]", "prior has shape [1, 5]; expected balanced"),
        (b"[[1], 0, 0, 0, 0]", "no list of numbers"),
        (b'["1", 0, 0, 0, 0]', "no list of numbers"),
        (b"[true, 0, 0, 0, 0]", "no list of numbers"),
        (b"[1, null, 0, 0, 0]", "no list of numbers"),
        (b"[" * 300, "no list of numbers"),
        (b"[1" + b"0" * 350 + b"]", "no list of numbers"),
        (b"[" * 100_000, "prior has 100000 bytes; expected at most 384"),
    ],
)
def test_an_invalid_prior_is_rejected_with_its_row_and_no_other_request(
    classifier: Any, text: bytes, message: str
) -> None:
    first, second = classifier.execute([named([picture(0)] * 2, b"train", text), named([picture(1)], b"train")])
    assert first.error.message().startswith("row 1: ")
    assert message in first.error.message()
    assert "\n" not in first.error.message() and len(first.error.message()) < 200
    assert second.error is None


def test_both_placements_of_the_network_give_equal_responses(
    classifier: Any, classifier_with_network: Any, calls: list
) -> None:
    batch = [
        request([picture(0)], strength=[[0.3]]),
        request([b"no image"]),
        named([picture(1)] * MAX_BATCH_SIZE, *[b"train"] * MAX_BATCH_SIZE),
        request([picture(2)], target_prior=[[0.2] * 5]),
    ]
    remote = classifier.execute(batch)
    call_count = len(calls)
    for own, other in zip(classifier_with_network.execute(batch), remote, strict=True):
        assert own.has_error() == other.has_error()
        for name in () if own.has_error() else ("class", "index", "probability"):
            np.testing.assert_array_equal(own[name], other[name])
    assert len(calls) == call_count > 0


def test_failing_network_is_an_error_and_no_answer(
    classifier_with_network: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(classifier_with_network.network, "run", fail)
    answer = classifier_with_network.execute([request([picture(1)])])[0]
    assert answer.error.message() == "student 1 failed: out of memory"
    assert answer.error.code == TritonError.INTERNAL


def test_instance_uses_all_cores_only_when_no_other_instance_works(
    student: Any, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, used = student.network, []

    def session(name: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(run=lambda *_arguments: used.append(name))

    monkeypatch.setattr(network, "share_session", session("share"))
    monkeypatch.setattr(network, "full_session", session("all"))
    image, strength = np.zeros((1, 3, 8, 8), np.uint8), np.zeros((1, 1), np.float32)
    for _ in range(4):
        network.run(image, strength)
    # Another instance (a separate process) that is killed during a request.
    held = "import fcntl, sys; f = open(sys.argv[1], 'rb'); fcntl.lockf(f, fcntl.LOCK_SH); print(flush=True); input()"
    path = repository / "student" / "1" / "model.onnx"
    with subprocess.Popen([sys.executable, "-c", held, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        network.run(image, strength)
        other.kill()
    for _ in range(3):
        network.run(image, strength)
    assert used == ["share", "share", "all", "all", "share", "share", "share", "all"]


def test_batch_larger_than_the_student_takes_is_cut(classifier: Any, calls: list) -> None:
    answers = classifier.execute(
        [request([picture(seed)] * MAX_BATCH_SIZE) for seed in range(2)] + [request([picture(2)])]
    )
    assert [rows for _, _, rows in calls] == [MAX_BATCH_SIZE, MAX_BATCH_SIZE, 1]
    assert [len(answer["index"]) for answer in answers] == [MAX_BATCH_SIZE, MAX_BATCH_SIZE, 1]


def test_bad_row_fails_its_request_and_its_mates_are_answered(classifier: Any, release: Release) -> None:
    uniform = [[0.2] * 5] * 2
    batch = [
        request([picture(0)], strength=[[0.0]]),
        request([b"no image"], strength=[[0.0]]),
        request([picture(1), b""], target_prior=uniform),
        request([picture(2)], strength=[[np.nan]]),
        request([picture(3)], target_prior=[[0.5, 0.5, 0.5, 0, 0]]),
        request([picture(5)], target_prior=[[0.2] * 5]),
    ]
    answers = classifier.execute(batch)
    assert [answer.error and answer.error.message() for answer in answers] == [
        None,
        "image is not a JPEG, PNG or WebP image",
        "row 1: image is empty (0 bytes); expected a JPEG, PNG or WebP image",
        "strength is nan; expected a finite number",
        "target_prior sums to 1.5; expected a sum of 1",
        None,
    ]
    assert {answer.error.code for answer in answers if answer.error} == {TritonError.INVALID_ARG}
    for place in (0, 5):
        expected = release.probabilities([picture(place)], np.zeros(len(CLASSES)))[0]
        np.testing.assert_allclose(answers[place]["probability"][0], np.sort(expected)[::-1][:3], rtol=1e-4)


def test_image_that_exhausts_memory_fails_one_request(classifier: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = classifier.parser.preprocess.decode

    def exhausted(data: bytes, *options: Any) -> Image.Image:
        if data == b"vast":
            raise MemoryError
        return whole(data, *options)

    monkeypatch.setattr(classifier.parser.preprocess, "decode", exhausted)
    answers = classifier.execute([request([b"vast"]), request([picture(1)])])
    assert answers[0].error.message() == "image needs more memory than is available; send a smaller one"
    assert answers[1].error is None


def test_batch_of_bad_requests_alone_never_reaches_the_student(classifier: Any, calls: list) -> None:
    assert all(answer.error for answer in classifier.execute([request([b"x"]), request([b"y"])]))
    assert calls == []


def test_failing_student_is_an_error_and_no_answer(
    classifier: Any, student: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = TritonError("out of memory", TritonError.INTERNAL)
    failed = types.SimpleNamespace(has_error=lambda: True, error=lambda: error)
    monkeypatch.setattr(student, "execute", lambda _requests: [failed])
    answer = classifier.execute([request([picture(1)])])[0]
    assert answer.error.message() == "student 1 failed: out of memory"
    assert answer.error.code == TritonError.INTERNAL


def test_student_fails_a_request_whose_strength_is_not_finite_alone(student: Any) -> None:
    image = Tensor("image", np.full((1, 3, 8, 8), 100, dtype=np.uint8))
    strengths = (0.0, np.nan, 1.0)
    batch = [Response([image, Tensor("strength", np.array([[s]], dtype=np.float32))]) for s in strengths]
    answers = student.execute(batch)
    assert [answer.has_error() for answer in answers] == [False, True, False]
    assert "strength" in answers[1].error.message()


def test_student_returns_the_requested_outputs(student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 8, 8), dtype=np.uint8)
    asked = Response([Tensor("image", pixels), Tensor("strength", np.zeros((1, 1), dtype=np.float32))])
    [both] = student.execute([asked])
    assert [tensor.name for tensor in both.tensors] == ["logits", "feature"]
    for name in ("logits", "feature"):
        monkeypatch.setattr(asked, "requested_output_names", lambda name=name: [name], raising=False)
        [one] = student.execute([asked])
        assert [tensor.name for tensor in one.tensors] == [name]
        np.testing.assert_array_equal(one[name], both[name])


# Includes the config of a container: there the classifier calls `student`, whose backend checks no hash.
@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("student", "configs/local.pbtxt"),
        ("classifier", "configs/local.pbtxt"),
        ("classifier", "config.pbtxt"),
    ],
)
@pytest.mark.parametrize("linked", [False, True], ids=["repository", "local tree"])
def test_changed_or_absent_graph_is_not_loaded(
    repository: Path, tmp_path: Path, model: str, config: str, linked: bool
) -> None:
    root = shutil.copytree(repository, tmp_path / "repository of versions")
    path = root / "student" / "1" / "model.onnx"
    seen = root
    if linked:
        (tmp_path / "seen").mkdir()
        seen = link_tree(root, tmp_path / "seen")
        shutil.copyfile(root / model / "config.pbtxt", seen / model / "config.pbtxt")  # `load` reads it from there
    load(seen, model, config, backend())
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(TritonModelException) as caught:
        load(seen, model, config, backend())
    expected = json.loads((path.parent / "manifest.json").read_text())["files"]["student.onnx"]
    assert str(caught.value) == (
        f"student/1/model.onnx: sha256 is {sha256_of(path)[:12]}..., manifest.json has {expected[:12]}...; "
        "write the version again"
    )
    path.unlink()
    with pytest.raises(TritonModelException) as caught:
        load(seen, model, config, backend())
    assert str(caught.value) == "student/1/model.onnx: No such file or directory; write the version again"


def test_student_without_its_provider_names_what_to_install(release: Release, tmp_path: Path) -> None:
    if "CUDAExecutionProvider" in pytest.importorskip("onnxruntime").get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    root = write_repository(release.export_dir, tmp_path / "repository", device="gpu")
    with pytest.raises(TritonModelException, match="install onnxruntime-gpu"):
        load(root, "student", "configs/local.pbtxt", backend())

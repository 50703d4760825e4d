"""Prediction sets and decisions of the classifier, on a fake of Triton's backend: against numpy, and invalid requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CLASSES, COUNTS, Release, picture, write_export
from scipy.special import logsumexp

from models.decisions import SetThresholds, cheapest, prediction_set
from models.prior import softmax
from serving.client.predictions import extra_parts
from serving.repository.writer import write_repository
from serving.transport.messages import Answer
from tests.support.stand_in import Response, Tensor, counted, request

TEMPERATURE = 5.0
C = len(CLASSES)
SCORES = [np.random.default_rng(c).uniform(size=n).round(3).tolist() for c, n in enumerate([30, 20, 9, 2, 0])]
MATRIX = (np.arange(C * C).reshape(C, C) % 7 * (1 - np.eye(C))).tolist()
KEYS: dict[str, Any] = {
    "calibration": {"temperature": TEMPERATURE, "images": 61, "effective": 20.0},
    "sets": {"scores": SCORES, "interpolation": 0.9},
    "unknown": {"scores": {"many": [-1.0, -0.5, 0.0, 0.1] * 10, "medium": [0.0] * 30, "few": [0.0] * 5}},
}


def written(folder: Path, **keys: Any) -> tuple[Release, Path]:
    export = folder / "export"
    release = Release(export, write_export(export, **keys))
    return release, write_repository(export, folder / "repository")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Release, Path]:
    return written(tmp_path_factory.mktemp("extras"), **KEYS)


@pytest.fixture
def repository(made: tuple[Release, Path], tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    keys = getattr(request, "param", None)
    return made[1] if keys is None else written(tmp_path, **keys)[1]


def asked(images: list[bytes], texts: dict[str, bytes] | None = None, **inputs: object) -> Response:
    """Build a request with FP32 inputs, and texts repeated for each image."""
    built = request(images, **inputs)
    for name, text in (texts or {}).items():
        built.tensors.append(Tensor(name, np.array([[text]] * len(images), dtype=np.object_)))
    return built


def names_of(response: Response, row: int) -> list[str]:
    return [name.decode() for name in response["set"][row] if name]


def test_sets_and_decisions_are_those_of_numpy_under_the_prior_of_each_row(
    classifier: Any, made: tuple[Release, Path]
) -> None:
    images = [picture(seed) for seed in range(4)]
    strengths = np.array([[0.0], [1.0], [0.4], [1.0]])
    coverage = np.array([[0.9], [0.5], [0.9], [0.95]])
    costs = {"costs": json.dumps(MATRIX).encode()}
    [response] = classifier.execute([asked(images, costs, strength=strengths, coverage=coverage, ask=[[2.5]] * 4)])
    assert response.error is None
    log_prior = np.log(np.array(COUNTS) / sum(COUNTS))
    logits = made[0].logits(images).astype(np.float64) / TEMPERATURE
    thresholds = SetThresholds(SCORES, 0.9)
    for row in range(4):
        p = softmax(logits[row] + strengths[row] * log_prior)[None]
        prior = softmax(strengths[row] * log_prior)
        [members] = prediction_set(softmax(logits[row])[None], p, thresholds.thresholds(float(coverage[row][0]), prior))
        assert names_of(response, row) == [CLASSES[index] for index in members]
        assert response["set_size"][row].tolist() == [len(members)]
        [index], [cost] = cheapest(p, np.array(MATRIX), 2.5)
        assert response["decision_index"][row].tolist() == [index]
        assert response["decision"][row][0].decode() == ("" if index < 0 else CLASSES[index])
        assert response["expected_cost"][row][0] == pytest.approx(cost, rel=1e-5)
    assert -1 in response["decision_index"] or (response["decision_index"] >= 0).all()


def test_a_class_that_the_prior_rules_out_is_in_no_set(classifier: Any) -> None:
    prior = np.array([[0.5, 0.5, 0, 0, 0]])
    [response] = classifier.execute([asked([picture(1)], target_prior=prior, coverage=[[0.98]])])
    assert set(names_of(response, 0)) <= set(CLASSES[:2])


def test_a_request_without_extras_gets_the_outputs_of_today_beside_one_with_extras(classifier: Any) -> None:
    plain, wanting = classifier.execute(
        [asked([picture(1)], strength=[[0.0]]), asked([picture(2)], strength=[[0.0]], coverage=[[0.9]])]
    )
    today = ["class", "index", "probability"]
    assert [tensor.name for tensor in plain.tensors] == today
    assert [tensor.name for tensor in wanting.tensors] == [*today, "set", "set_size"]


@pytest.mark.parametrize(
    "repository",
    [{**KEYS, "sets": KEYS["sets"] | {"coverage": 0.9}, "decision": {"costs": [1, 1, 1, 1, 50], "ask": 0.8}}],
    indirect=True,
)
def test_the_release_has_defaults_and_a_request_replaces_them(classifier: Any) -> None:
    [default] = classifier.execute([asked([picture(1)], strength=[[0.0]])])
    [same] = classifier.execute(
        [asked([picture(1)], {"costs": b"[1, 1, 1, 1, 50]"}, strength=[[0.0]], coverage=[[0.9]], ask=[[0.8]])]
    )
    for name in ("set", "set_size", "decision", "decision_index", "expected_cost"):
        assert default[name].tolist() == same[name].tolist()
    [free] = classifier.execute([asked([picture(1)], strength=[[0.0]], ask=[[0.0]])])
    assert free["decision_index"].tolist() == [[-1]] and free["decision"].tolist() == [[b""]]


def listing(built: Response, *names: str) -> Response:
    """Make a request list its outputs."""
    built.listed = ["class", "index", "probability", *names]
    return built


def test_the_packed_output_has_the_values_of_the_separate_ones_to_the_last_bit(classifier: Any) -> None:
    images = [picture(seed) for seed in range(8)]
    inputs = {"coverage": [[0.9]] * 8, "ask": [[2.5]] * 8, "false_alarms": [[0.2]] * 8}
    costs = {"costs": json.dumps(MATRIX).encode()}
    [separate] = classifier.execute([asked(images, costs, **inputs)])
    batch = [listing(asked(images[start : start + 4], costs, **rows_of(inputs, start)), "extras") for start in (0, 4)]
    packed = [row for response in classifier.execute(batch) for row in response["extras"]]
    assert {each.name for each in separate.tensors} >= {"set_size", "decision_index", "typicality"}
    outputs = {each.name: each.array for each in separate.tensors}
    for row in range(8):
        alone = Answer({"extras": np.array([packed[row]], dtype=np.object_)}, 1)
        assert extra_parts(alone, 0) == extra_parts(Answer(outputs, 1), row)


def rows_of(inputs: dict[str, Any], start: int) -> dict[str, Any]:
    return {name: rows[start : start + 4] for name, rows in inputs.items()}


@pytest.mark.parametrize("repository", [{**KEYS, "sets": KEYS["sets"] | {"coverage": 0.9}}], indirect=True)
def test_a_default_costs_nothing_where_a_request_lists_other_outputs(
    classifier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets, calls = classifier.extras.sets, []
    monkeypatch.setattr(classifier.extras, "sets", lambda *batch: calls.append(len(batch[1])) or sets(*batch))
    plain, sized, every = classifier.execute(
        [listing(asked([picture(1)])), listing(asked([picture(2)]), "set_size"), listing(asked([picture(3)]), "extras")]
    )
    assert [each.name for each in plain.tensors] == ["class", "index", "probability"]
    assert sized["set_size"][0][0] == len(names_of(sized, 0))
    assert list(json.loads(every["extras"][0][0])) == ["set"] and sum(calls) == 2


def test_an_unknown_image_is_less_familiar_than_the_wanted_share_of_validation_images(
    classifier: Any, made: tuple[Release, Path]
) -> None:
    images = [picture(seed) for seed in range(12)]
    [response] = classifier.execute([asked(images, strength=[[1.0]] * 12, false_alarms=[[0.3]] * 12)])
    logits = made[0].logits(images).astype(np.float64) / TEMPERATURE
    density = logsumexp(logits, axis=1, b=np.array(COUNTS) / sum(COUNTS))
    groups = np.array(["many", "many", "medium", "medium", "few"])[logits.argmax(1)]
    for row in range(12):
        scores = KEYS["unknown"]["scores"][groups[row]]
        expected = (1 + sum(score <= density[row] for score in scores)) / (1 + len(scores))
        assert response["typicality"][row][0] == pytest.approx(expected, rel=1e-6)
        assert response["unknown"][row].tolist() == [expected <= 0.3]
    assert response["unknown"].dtype == bool
    counts = counted(classifier.metrics, "tailor_unknown_total")
    assert counts == {("unknown",): response["unknown"].sum(), ("known",): 12 - response["unknown"].sum()}


INVALID = [
    ({"coverage": [[0.0]]}, {}, "coverage is 0; expected a number above 0 and below 1"),
    ({"coverage": [[1.0]]}, {}, "coverage is 1; expected"),
    ({"coverage": [[-0.5]]}, {}, "coverage is -0.5; expected"),
    ({"coverage": [[np.nan]]}, {}, "coverage is nan; expected"),
    ({"coverage": [[np.inf]]}, {}, "coverage is inf; expected"),
    ({"coverage": [0.9]}, {}, "coverage has shape [1]; expected [1, 1]"),
    ({"coverage": [[0.999]]}, {}, "the 61 validation images of this release support at most 0.9839, 0.999 needs 999"),
    ({"false_alarms": [[0.0]]}, {}, "false_alarms is 0; expected a number above 0 and below 1"),
    ({"false_alarms": [[np.nan]]}, {}, "false_alarms is nan; expected"),
    ({"ask": [[-1.0]]}, {}, "ask is -1; expected a finite price of at least 0"),
    ({"ask": [[np.nan]]}, {}, "ask is nan"),
    ({}, {"costs": b"[1, 2, 3]"}, "costs has shape [3]; expected 5 numbers, one per class, or 5 rows of 5"),
    ({}, {"costs": b"[[1, 2], [3, 4]]"}, "costs has shape [2, 2]"),
    ({}, {"costs": b"[1, 1, -1, 1, 1]"}, "costs has -1; expected finite numbers >= 0"),
    ({}, {"costs": b"[1, 1, NaN, 1, 1]"}, "costs has nan"),
    ({}, {"costs": b"cheap"}, "costs is 'cheap', no lists of numbers; expected 5 numbers"),
    ({}, {"costs": b'{"ant": 1}'}, "no lists of numbers"),
    ({}, {"costs": b"[[1, 2], [3]]"}, "no lists of numbers"),
    ({}, {"costs": b"[" * 100_000}, "costs has 100000 bytes; expected at most 1728"),
    ({}, {"costs": b"[" * 1000}, "no lists of numbers"),
    ({}, {"costs": b"[true, 1, 1, 1, 1]"}, "no lists of numbers"),
    ({}, {"costs": b"[1, 1, 1, 1, 1e39]"}, "costs has 1e+39; expected finite numbers >= 0, at most 3.403e+38"),
    ({}, {"costs": b"[1" + b"0" * 400 + b", 1, 1, 1, 1]"}, "no lists of numbers"),
]


@pytest.mark.parametrize(("inputs", "texts", "message"), INVALID)
def test_an_invalid_extra_fails_its_request_alone_and_is_named(
    classifier: Any, inputs: dict[str, object], texts: dict[str, bytes], message: str
) -> None:
    failed, mate = classifier.execute([asked([picture(1)], texts, **inputs), asked([picture(2)])])
    assert mate.error is None
    assert message in failed.error.message() and "\n" not in failed.error.message()


def test_the_smallest_coverage_fails_no_request_of_its_batch(classifier: Any) -> None:
    smallest, mate = classifier.execute([asked([picture(1)], coverage=[[1e-40]]), asked([picture(2)])])
    assert smallest.error is None and smallest["set_size"].tolist() == [[len(names_of(smallest, 0))]]
    assert mate.error is None


def test_invalid_costs_name_their_row_and_equal_texts_are_read_once(
    classifier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = asked([picture(1)] * 3)
    long = json.dumps([1, 1, 1, 1, 1.5]).encode() + b" " * 1000
    sent.tensors.append(Tensor("costs", np.array([[long], [b"[1]"], [long]], dtype=np.object_)))
    [response] = classifier.execute([sent])
    assert response.error.message().startswith("row 1: costs has shape [1]")
    reads, read = [], classifier.extras.read_costs
    monkeypatch.setattr(classifier.extras, "read_costs", lambda text: reads.append(text) or read(text))
    other = b"[2, 1, 1, 1, 1]"
    sent.tensors[-1].array[:] = [[other], [bytes(bytearray(other))], [other]]
    assert all(response.error is None for response in classifier.execute([sent, sent]))
    assert reads == [other]


def test_the_texts_of_costs_that_are_kept_have_a_limit_of_bytes(
    classifier: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(type(classifier.extras).cached_costs.__globals__, "CACHED_COSTS", 50)
    for number in range(20):
        classifier.extras.cached_costs(b"[1, 1, 1, 1, %d]" % (number + 10))
        kept = classifier.extras.costs_cache
        assert kept and sum(map(len, kept)) == classifier.extras.costs_bytes <= 50


@pytest.mark.parametrize("repository", [{}], indirect=True)
def test_a_release_without_validation_scores_refuses_a_coverage_but_decides(classifier: Any) -> None:
    [refused] = classifier.execute([asked([picture(1)], coverage=[[0.9]])])
    assert "this release has no prediction sets; train with at least 30 validation images" in refused.error.message()
    [refused] = classifier.execute([asked([picture(1)], false_alarms=[[0.1]])])
    assert "this release cannot detect unknown images" in refused.error.message()
    [decided] = classifier.execute([asked([picture(1)], ask=[[0.1]])])
    assert decided.error is None and decided["decision"].shape == (1, 1)


def test_a_manifest_with_costs_or_scores_of_other_classes_is_refused(made: tuple[Release, Path]) -> None:
    content = made[0].manifest.model_dump()
    for change, message in (
        ({"decision": {"costs": [1.0]}}, "costs has shape"),
        ({"sets": {"scores": [[0.5]], "interpolation": 0.9}}, "sets.scores and classes differ in length"),
    ):
        with pytest.raises(ValueError, match=message):
            type(made[0].manifest).model_validate(content | change)

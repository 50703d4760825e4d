"""Extra parts of an answer in client and command line: wrong values are named before a request is sent."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.client import requests
from serving.client.extras import Extras, outputs_of, read_costs, row_bytes
from serving.commands.app import main
from serving.shared.errors import InputError, ServingError
from serving.transport.messages import Answer

WRONG = [
    ({"coverage": 0}, "coverage is 0; expected a number above 0 and below 1"),
    ({"coverage": 1.0}, "coverage is 1; expected"),
    ({"coverage": math.nan}, "coverage is nan; expected"),
    ({"coverage": "high"}, "coverage is 'high'; expected a number"),
    ({"coverage": True}, "coverage is True; expected a number"),
    ({"false_alarms": 1}, "false_alarms is 1; expected"),
    ({"ask": -0.5}, "ask is -0.5; expected a finite price"),
    ({"ask": math.inf}, "ask is inf; expected a finite price"),
    ({"level": 0}, "level is 0; expected"),
    ({"level": 1.5}, "level is 1.5; expected"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_a_wrong_number_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        Extras(**values)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ({"yeti": 2}, "costs name class 'yeti', which the server does not have"),
        ({"ant": -1}, "costs: has -1; expected finite numbers >= 0"),
        ({"ant": "dear"}, "costs: class 'ant' has 'dear'; expected a number"),
        ([[1, 2], [3]], "costs: "),
        ([[1, 2, 3], [1, 2, 3]], r"costs: has shape [2, 3]; expected 2 numbers, one per class, or 2 rows of 2"),
        ([1, math.nan], "costs: has nan"),
        (3, "costs: has shape []"),
    ],
)
def test_wrong_costs_are_refused(costs: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        Extras(costs=costs).inputs(["ant", "bee"])
    assert str(error.value).startswith(message)


def test_parts_that_are_not_wanted_need_neither_input_nor_output() -> None:
    assert Extras().inputs(None) == {} and outputs_of({}) == {}
    rows = Extras(coverage=0.9, costs={"bee": 5}).inputs(["ant", "bee"])
    assert set(rows) == {"coverage", "costs"} and rows["costs"].tolist() == [b"[1.0, 5.0]"]
    assert set(outputs_of(rows)) == {"set", "set_size", "decision", "decision_index", "expected_cost"}


CONFIG = {
    "max_batch_size": 8,
    "input": [{"name": name, "dims": [1]} for name in ("image", "prior", "coverage", "explain")],
    "output": [{"name": "extras"}],
}
TODAY = {name: np.zeros((1, 1), np.float32) for name in ("index", "probability")} | {
    "class": np.array([[b"ant"]], dtype=np.object_)
}
SET = {"set": np.array([[b"ant", b"bee", b""]], dtype=np.object_)}


def test_a_version_without_the_packed_output_is_asked_again_for_separate_ones() -> None:
    """As after a roll back to a version that an older Tailor wrote: its config lists the output, its code lacks it."""
    sequence = requests.RequestSequence("http://server")
    calls: list[Any] = [sequence.predict([b"image"], "train", None, Extras(coverage=0.9)) for _ in range(2)]
    next(calls[0])
    [call] = calls[0].send([CONFIG])
    assert set(call.outputs) == set(requests.OUTPUTS) and call.optional == ("extras",)
    next(calls[1])  # of another thread, sent before the response to the first
    for steps in calls:
        [call] = steps.send([Answer(TODAY, 1)])
        assert {"set", "set_size"} <= set(call.outputs) and not call.optional
        with pytest.raises(StopIteration) as end:
            steps.send([Answer(TODAY | SET, 1)])
        assert end.value.value[0].set == ("ant", "bee")


def test_a_call_during_a_swap_gets_its_extras_from_a_version_without_the_packed_output() -> None:
    sequence = requests.RequestSequence("http://server")
    steps: Any = sequence.predict([b"image"], None, None, Extras(coverage=0.9))
    next(steps)
    steps.send([CONFIG])
    for version in (5, 6):
        steps.send([Answer(TODAY, version)])
    [call] = steps.send([CONFIG])  # of a new version the config is read again; it lists the packed output
    assert {"set", "set_size"} <= set(call.outputs) and not call.optional


def test_a_request_for_reasons_alone_is_sent_once_and_without_the_packed_output() -> None:
    sequence = requests.RequestSequence("http://server")
    steps: Any = sequence.predict([b"image"], "train", None, Extras(explain=True))
    next(steps)
    [call] = steps.send([CONFIG])
    assert "extras" not in call.optional
    with pytest.raises(StopIteration):
        steps.send([Answer(TODAY, 1)])


@pytest.mark.parametrize("text", [b"null", b'{"set": 3}', b'{"decision": "ant"}', b"\xff", b"[" * 100_000])
def test_a_packed_output_that_is_damaged_is_an_error_of_the_server(text: bytes) -> None:
    sequence = requests.RequestSequence("http://server")
    steps: Any = sequence.predict([b"image"], "train", None, Extras(coverage=0.9))
    next(steps)
    steps.send([CONFIG])
    with pytest.raises(ServingError, match="its response for classifier is not Triton's"):
        steps.send([Answer(TODAY | {"extras": np.array([[text]], dtype=np.object_)}, 1)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coverage", "1"], "coverage is 1; expected"),
        (["--coverage", "high"], "--coverage"),
        (["--costs", "costs.json"], "costs.json: is no JSON list or object"),
        (["--costs", "none.json"], "none.json: No such file"),
    ],
)
def test_the_command_names_a_wrong_option_and_ends_with_2(
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("costs.json").write_text("3")
    Path("a.png").write_bytes(b"")
    assert main(["predict", "a.png", *options]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(InputError, match="is no JSON list or object"):
        read_costs(Path("costs.json"))


def test_requests_are_split_by_the_bytes_of_costs_that_each_image_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "REQUEST_BYTES", 1000)
    further = row_bytes(None, *Extras(costs=[1.0] * 60, coverage=0.9).inputs(None).values())
    assert 4 + 60 * 3 < further < 400
    images = [b"x" * 10] * 9
    split = list(requests.chunks(images, 8, further))
    assert [len(chunk) for chunk in split] == [3, 3, 3]
    assert [len(chunk) for chunk in requests.chunks(images, 8)] == [8, 1]

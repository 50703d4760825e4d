"""Parsing of a request's prior, without a server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.client.priors import parse_prior, vector_of
from serving.shared.errors import InputError

NAMES = ["ant", "bee", "cat"]


@pytest.mark.parametrize(
    ("prior", "strength"),
    [("balanced", 0.0), ("train", 1.0), ("0.25", 0.25), ("-1", -1.0), (2, 2.0), (np.float32(0.5), 0.5), (None, None)],
)
def test_names_and_numbers_are_strengths(prior: object, strength: float | None) -> None:
    assert parse_prior(prior) == strength


@pytest.mark.parametrize(
    "content", ["[0.5, 0.3, 0.2]", "0.5\n0.3\n\n0.2\n", '{"bee": 0.3, "ant": 0.5, "cat": 0.2}', "  [5e-1,3e-1,2e-1]"]
)
def test_a_prior_file_has_a_list_an_object_or_lines(tmp_path: Path, content: str) -> None:
    (tmp_path / "prior").write_text(content)
    np.testing.assert_allclose(vector_of(parse_prior(tmp_path / "prior"), NAMES, 3), [0.5, 0.3, 0.2])
    np.testing.assert_allclose(vector_of(parse_prior(str(tmp_path / "prior")), NAMES, 3), [0.5, 0.3, 0.2])


def test_classes_missing_from_a_mapping_get_0() -> None:
    np.testing.assert_allclose(vector_of(parse_prior({"cat": 0.9, "ant": 0.1}), NAMES, 3), [0.1, 0, 0.9], rtol=1e-6)


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        ("nan", "prior is nan; as a strength, expected a finite number"),
        ("inf", "expected a finite number"),
        (1e300, "expected a finite number"),
        pytest.param(10**400, "prior is inf; as a strength, expected a finite number", id="a huge integer"),
        pytest.param([10**400, 0], "prior: holds a number too large", id="a huge integer in a list"),
        pytest.param({"ant": 10**400}, "prior: holds a number too large", id="a huge integer of a class"),
        ("nosuchfile.json", "prior is 'nosuchfile.json', and no such file exists; expected balanced, train"),
        ([0.5, -0.5, 1.0], "negative entry"),
        ([0.5, 0.1], "sums to 0.6"),
        ([np.nan, 1.0], "not finite"),
        ([], "shape"),
        ([[0.5, 0.5]], "shape"),
        (["much", "little"], "not a number"),
        (["1", 0], "not a number"),
        ([True, 0], "not a number"),
        (np.array(["1", "0"]), "not a number"),
        (np.array([True, False]), "not a number"),
        ([1, None], "not a number"),
        (True, "prior is True; expected balanced"),
        ("1_0", "prior is '1_0', and no such file exists"),
        ("\u0661", "prior is '\u0661', and no such file exists"),
        ({"ant": True}, "class 'ant' has True"),
        ({"ant": "much"}, "class 'ant' has 'much'"),
        ({"ant": 0.4}, "sums to 0.4"),
    ],
)
def test_an_invalid_prior_is_rejected(prior: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_prior(prior)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"0.5\nhalf\n", "line 2 is 'half'; expected a number"),
        (b"[0.5, 0.5", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'[0.5, "x"]', "not a number"),
        (b'["1", 0]', "not a number"),
        (b"[true, 0]", "not a number"),
        (b"1_0\n0\n", "line 1 is '1_0'; expected a number"),
        (b'{"ant": true}', "class 'ant' has True"),
        (b"[1" + b"0" * 400 + b"]", "holds a number too large"),
        (b"[1" + b"0" * 5000 + b"]", "is not JSON"),
        (b"", "shape"),
        (b"\xff\xfe\x00", "is not text"),
    ],
)
def test_an_invalid_prior_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        parse_prior(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_rejected_as_prior(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file"):
        parse_prior(tmp_path)


def test_a_vector_must_match_the_servers_classes() -> None:
    with pytest.raises(InputError, match="expected 3 numbers, one per class"):
        vector_of(parse_prior([0.5, 0.5]), None, 3)
    with pytest.raises(InputError, match="names class 'dog', which the server does not have; it has ant, bee, cat"):
        vector_of(parse_prior({"dog": 1.0}), NAMES, 3)


@given(st.text(max_size=30))
def test_any_text_is_a_prior_or_a_one_line_error(text: str) -> None:
    try:
        parsed = parse_prior(text)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(parsed, float)
        assert np.isfinite(parsed)

"""Answers at a node of a taxonomy, on a fake of Triton's backend: the deepest node, and invalid levels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CLASSES, COUNTS, Release, picture, write_export

from models.prior import softmax
from models.taxonomy import Taxonomy
from serving.client.predictions import extra_parts
from serving.repository.manifest import Manifest
from serving.repository.writer import write_repository
from serving.shared.errors import InputError
from serving.transport.messages import Answer
from tests.support.stand_in import request

# Of the five classes, three are of the first group, two of the second, and both groups of one root.
TREE: dict[str, Any] = {"names": [*CLASSES, "first", "second", "root"], "parents": [5, 5, 5, 6, 6, 7, 7, -1]}


@pytest.fixture
def made(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Release, Path]:
    keys = {"taxonomy": TREE, **getattr(request, "param", {})}
    export = tmp_path / "export"
    return Release(export, write_export(export, **keys)), write_repository(export, tmp_path / "repository")


@pytest.fixture
def repository(made: tuple[Release, Path]) -> Path:
    return made[1]


def test_the_node_is_the_deepest_that_reaches_the_level_under_the_prior_of_each_row(
    classifier: Any, made: tuple[Release, Path]
) -> None:
    images, levels = [picture(seed) for seed in range(6)], np.array([[0.2], [0.5], [0.7], [0.9], [0.99], [1.0]])
    strength = np.array([[0.0], [1.0], [0.4], [0.0], [1.0], [0.0]])
    [response] = classifier.execute([request(images, strength=strength, level=levels)])
    assert response.error is None
    log_prior = np.log(np.array(COUNTS) / sum(COUNTS))
    p = softmax(made[0].logits(images).astype(np.float64) + strength * log_prior)
    expected = Taxonomy(TREE["names"], TREE["parents"], len(CLASSES)).answers(p, levels[:, 0])
    assert [name.decode() for name in response["node"][:, 0]] == [TREE["names"][node.node] for node in expected]
    np.testing.assert_allclose(response["node_probability"][:, 0], [node.probability for node in expected], rtol=1e-5)
    assert response["node"][-1][0] == b"root" and response["node"].dtype == np.object_
    answer = Answer({name: response[name] for name in ("node", "node_probability")}, 1)
    assert extra_parts(answer, 5)["node"].name == "root"


def test_a_request_without_a_level_gets_the_outputs_of_today(classifier: Any) -> None:
    [response] = classifier.execute([request([picture(1)], strength=[[0.0]])])
    assert [tensor.name for tensor in response.tensors] == ["class", "index", "probability"]


@pytest.mark.parametrize("made", [{"taxonomy": TREE | {"level": 0.9}}], indirect=True)
def test_a_level_in_the_manifest_is_the_default(classifier: Any) -> None:
    default, named = classifier.execute(
        [request([picture(1)], strength=[[0.0]]), request([picture(1)], strength=[[0.0]], level=[[0.9]])]
    )
    assert default["node"].tolist() == named["node"].tolist()


@pytest.mark.parametrize("level", [0.0, -1.0, 1.5, np.nan, np.inf])
def test_a_level_outside_its_range_is_refused(classifier: Any, level: float) -> None:
    [response] = classifier.execute([request([picture(1)], level=[[level]])])
    assert "expected a number above 0 and at most 1" in response.error.message()


@pytest.mark.parametrize("made", [{"taxonomy": None}], indirect=True)
def test_a_release_without_a_taxonomy_says_so(classifier: Any) -> None:
    [response] = classifier.execute([request([picture(1)], level=[[0.9]])])
    assert "this release has no taxonomy" in response.error.message()


def test_a_manifest_with_a_wrong_taxonomy_is_refused(tmp_path: Path) -> None:
    manifest = write_export(tmp_path / "export").model_dump()
    for change, message in (
        ({"parents": [5, 5, 5, 6, 6, 7, 5, 6]}, "cycle"),
        ({"names": ["other", *TREE["names"][1:]]}, "do not begin with the classes"),
        ({"parents": [5]}, "8 names and 1 parents"),
    ):
        with pytest.raises(ValueError, match=message):
            Manifest.model_validate(manifest | {"taxonomy": TREE | change})


def test_the_client_refuses_a_wrong_level() -> None:
    from serving.client import Extras

    assert Extras(level=1).inputs(None)["level"].tolist() == [1.0]
    for level, message in (
        (0, "expected a number above 0 and at most 1"),
        (True, "expected a number"),
        ("x", "number"),
    ):
        with pytest.raises(InputError, match=message):
            Extras(level=level)  # type: ignore[arg-type]

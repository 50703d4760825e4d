"""Files of release 0.1.0 in this code: they load, or one line states what to change.

tests/data/release-0.1.0 has that release's params.yaml, and files of no trained network in its formats: the export that
`write_export` of tests/serving/conftest.py makes (a graph of 4 kB with random weights, metrics that were not measured), and
prior.json and predictions.parquet of its five classes and ten made images. The code of commit 814fe04, version 0.1.0,
reads all of them, and its Manifest has the keys of manifest.json. Do not write these files again: a change that cannot
read them needs a line in CHANGELOG.md and an error message that states what to do.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from models.preprocess import preprocess
from models.prior import softmax
from pipeline.data.class_prior import load_prior
from pipeline.evaluation.predictions import Contender, load_predictions
from pipeline.params import load_params
from pipeline.shared.errors import ParamsError
from serving.repository.manifest import ManifestError, load_golden, load_manifest
from serving.repository.release import find_releases, published_versions, read_champion, read_release
from serving.repository.writer import publish, write_repository

OLD = Path(__file__).parent / "data/release-0.1.0"


def values(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= values(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def test_params_of_the_release_before_load_with_their_values() -> None:
    written = yaml.safe_load((OLD / "params.yaml").read_text(encoding="utf-8"))
    params = load_params(OLD / "params.yaml").model_dump(mode="json")
    loaded = {key: value for key, value in values(params).items() if key in values(written)}
    assert loaded == values(written) and len(loaded) > 100
    # Keys that the release did not have keep their defaults: no encoder.
    assert params["encoder"] is None and params["student"]["tune"] == "none"


def test_a_key_that_this_release_does_not_have_is_named_in_one_line(tmp_path: Path) -> None:
    text = (OLD / "params.yaml").read_text(encoding="utf-8").replace("\nserving:\n", "\nserving:\n  retired: 1\n")
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(
        ParamsError, match=r"params\.yaml: serving\.retired is not a key; (did you mean|allowed:) "
    ) as error:
        load_params(tmp_path / "params.yaml")
    assert "\n" not in str(error.value)


def test_the_release_before_gives_its_golden_responses(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    write_repository(OLD / "export", tmp_path / "repository")
    release = read_champion(tmp_path / "repository")
    assert read_release(tmp_path / "repository", 1).manifest == release.manifest == load_manifest(OLD / "export")
    assert release.manifest.versions["tailor"] == "0.1.0"
    session = onnxruntime.InferenceSession(
        tmp_path / "repository/student/1/model.onnx", providers=["CPUExecutionProvider"]
    )
    image = release.manifest.image
    requests = load_golden(OLD / "export")
    assert len(requests) > 0
    for golden in requests:
        pixels = preprocess(golden.image_bytes(), image.size, image.resize_to)[None]
        strength = np.array([[golden.strength]], np.float32)
        [logits] = session.run(["logits"], {"image": pixels, "strength": strength})
        probability = softmax(logits[0])
        best = np.argsort(-probability)[: release.manifest.top_k]
        assert golden.difference(best.tolist(), probability[best].tolist()) is None


def test_a_new_release_is_published_beside_the_release_before(tmp_path: Path) -> None:
    write_repository(OLD / "export", tmp_path / "repository")
    assert publish(OLD / "export", tmp_path / "repository") == 1
    shutil.copytree(OLD / "export", tmp_path / "export")
    manifest = json.loads((tmp_path / "export/manifest.json").read_text(encoding="utf-8"))
    manifest["params_sha256"] = "1" * 64
    (tmp_path / "export/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert publish(tmp_path / "export", tmp_path / "repository") == 2


def test_a_repository_that_the_release_before_wrote_is_served(tmp_path: Path) -> None:
    root = write_repository(OLD / "export", tmp_path / "repository")
    for name in ("extras.py", "decisions.py", "taxonomy.py"):  # that release did not write them
        (root / "classifier/1" / name).unlink()
    assert [release.version for release in find_releases(root)] == published_versions(root) == [1]


@pytest.mark.parametrize(("key", "value"), [("format", 2), ("of_a_later_release", 1)])
def test_a_manifest_of_another_format_is_refused_in_one_line(tmp_path: Path, key: str, value: int) -> None:
    shutil.copytree(OLD / "export", tmp_path / "export")
    manifest = json.loads((OLD / "export/manifest.json").read_text(encoding="utf-8")) | {key: value}
    (tmp_path / "export/manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ManifestError, match=rf"manifest\.json: {key}: .*; run `dvc repro` to remake it") as error:
        load_manifest(tmp_path / "export")
    assert "\n" not in str(error.value)


def test_predictions_of_the_release_before_can_be_compared() -> None:
    run = Contender(OLD / "predictions.parquet", OLD / "prior.json")
    predictions = load_predictions(run, "train")
    assert predictions.probabilities.shape == (10, 5)
    assert np.allclose(np.exp(load_prior(OLD / "prior.json").log_prior), np.array([1000, 300, 90, 27, 8]) / 1425)
    assert predictions.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]

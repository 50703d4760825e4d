"""Answers of a release with a temperature: the classifier divides balanced logits by it, then adds the prior."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CLASSES, COUNTS, TAU_S, TOP_K, Release, picture, write_export

from models.prior import softmax
from serving.golden.dry_run import run_golden
from serving.repository.release import read_champion
from serving.repository.writer import write_repository
from serving.shared.errors import RepositoryError
from tests.support.stand_in import request

TEMPERATURE = 1 / (2 * TAU_S)
CALIBRATION = {"temperature": TEMPERATURE, "images": 100, "effective": 80.5}


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    folder = tmp_path_factory.mktemp("calibrated") / "export"
    return Release(folder, write_export(folder, calibration=CALIBRATION))


@pytest.fixture(scope="module")
def repository(release: Release, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_repository(release.export_dir, tmp_path_factory.mktemp("served") / "repository")


def answered(classifier: Any, images: list[bytes], **inputs: object) -> tuple[np.ndarray, np.ndarray]:
    [response] = classifier.execute([request(images, **inputs)])
    assert response.error is None
    return response["index"], response["probability"]


@pytest.mark.parametrize("strength", [0.0, 1.0, -0.7])
def test_the_prior_is_added_to_the_logits_divided_by_the_temperature(
    classifier: Any, release: Release, strength: float
) -> None:
    images = [picture(seed) for seed in range(6)]
    log_prior = np.log(np.array(COUNTS) / sum(COUNTS))
    expected = softmax(release.logits(images).astype(np.float64) / TEMPERATURE + strength * log_prior)
    index, probability = answered(classifier, images, strength=np.full((6, 1), strength))
    assert index.tolist() == np.argsort(-expected, kind="stable")[:, :TOP_K].tolist()
    np.testing.assert_allclose(probability, np.take_along_axis(expected, index.astype(int), 1), rtol=1e-4)


def test_a_prior_of_the_caller_is_not_divided_by_the_temperature(classifier: Any, release: Release) -> None:
    prior = np.array([0.05, 0.05, 0.1, 0.3, 0.5])
    expected = softmax(release.logits([picture(1)]).astype(np.float64) / TEMPERATURE + np.log(prior))[0]
    index, probability = answered(classifier, [picture(1)], target_prior=prior[None])
    np.testing.assert_allclose(probability[0], expected[index[0]], rtol=1e-4)


def test_the_dry_run_compares_calibrated_answers_at_every_strength(repository: Path) -> None:
    champion = read_champion(repository)
    run_golden(repository, champion)
    without = champion.manifest.model_copy(update={"calibration": None})
    with pytest.raises(RepositoryError, match="a golden request is answered wrongly: probability"):
        run_golden(repository, type(champion)(**{**vars(champion), "manifest": without}))


def test_a_manifest_from_before_the_key_serves_plain_logits(release: Release) -> None:
    content = json.loads((release.export_dir / "manifest.json").read_text())
    del content["calibration"]
    assert type(release.manifest).model_validate(content).calibration is None
    assert len(content["classes"]) == len(CLASSES)

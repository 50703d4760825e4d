"""Predict the test split with a published version's graph in ONNX Runtime, without a server."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from models.prior import class_key, class_prior, shot_group
from pipeline.data.class_prior import Prior
from pipeline.data.split_tables import load_classes
from pipeline.evaluation.predictions import Predictions
from pipeline.params import Params
from pipeline.shared.errors import StageError


def predict_with_release(repository: Path, version: int | None, params: Params, target_prior: str) -> Predictions:
    """Predictions of a version on data/split/test.parquet for the target prior. version: None is the champion.

    Raises InputError if the version does not exist, RepositoryError or ManifestError if the repository is damaged,
    StageError if its classes are not those of the split, ParamsError if there is no split.
    """
    import torch

    from pipeline.data.dataset import evaluation_images
    from pipeline.model_io.inference import NotFiniteError, check_finite
    from pipeline.onnx_export.release import open_session
    from serving.repository.manifest import served_probabilities
    from serving.repository.release import published_versions, read_champion, read_release
    from serving.shared.errors import InputError
    from serving.shared.names import STUDENT

    champion = read_champion(repository).version  # also with a given version, to detect a damaged repository
    version = champion if version is None else version
    if version not in (existing := published_versions(repository)):
        raise InputError(f"{repository}: holds no version {version}; it has {', '.join(map(str, existing))}")
    manifest = read_release(repository, version).manifest
    if load_classes() != [class_key(name) for name in manifest.classes]:
        raise StageError(f"version {version} of {repository} has other classes than data/split/classes.json")
    image = params.image.model_copy(update=manifest.image.model_dump(include={"size", "resize_to", "interpolation"}))
    test = evaluation_images(params.model_copy(update={"image": image}), "test")
    session = open_session(repository / STUDENT / str(version) / "model.onnx")
    strength = 1.0 if target_prior == "train" else 0.0
    logits = []
    for images in test.batches(torch.arange(len(test)), manifest.max_batch_size):
        inputs = {"image": images.numpy(), "strength": np.full((len(images), 1), strength, np.float32)}
        logits += session.run(["logits"], inputs)
    p = class_prior(manifest.counts, 0.0 if all(manifest.counts) else 1.0)
    groups = [shot_group(count) for count in manifest.counts]
    prior = Prior(manifest.classes, manifest.counts, p.tolist(), manifest.log_prior, groups)
    order = np.argsort(np.array(list(test.sample_ids)))
    try:
        finite = check_finite(np.concatenate(logits))[order]
    except NotFiniteError as error:
        raise StageError(f"version {version} of {repository}: {error}") from None
    probabilities = served_probabilities(finite, strength, manifest.log_prior, manifest.calibration)
    return Predictions([test.sample_ids[i] for i in order], test.labels.numpy()[order], probabilities, prior)

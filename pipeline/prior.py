"""Stage `prior`: compute the class prior of the training split; writes artifacts/prior.json."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from models.prior import class_prior, effective_number, log_class_prior, pixel_groups, shot_group
from pipeline.command_line import stage_main
from pipeline.data.class_prior import PixelPrior, Prior, count_labels, count_pixels
from pipeline.data.split_tables import load_classes
from pipeline.params import Params
from pipeline.shared.artifacts import PRIOR, SPLIT, write_json
from pipeline.shared.errors import DataError


def run(params: Params, split: Path = SPLIT, output: Path = PRIOR) -> Prior:
    """Count the training labels and write counts, p, log_prior and groups. Raises DataError for a class without samples.

    For task segmentation the samples are the pixels of the label maps at their original size.
    """
    classes, pixels = load_classes(split), params.task == "segmentation"
    counts = (count_pixels if pixels else count_labels)(split / "train.parquet", len(classes)).tolist()
    smoothing = params.prior.smoothing
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty and smoothing == 0:
        raise DataError(
            f"class {empty[0]!r} has no training samples (such classes: {len(empty)}); add samples, remove the class, or "
            "set prior.smoothing above 0"
        )
    p = class_prior(counts, smoothing)
    in_losses = None
    if params.prior.weighting == "effective_number":
        in_losses = log_class_prior(effective_number(counts, params.prior.beta), smoothing).tolist()
    groups = pixel_groups(counts) if pixels else [shot_group(count) for count in counts]
    prior = (PixelPrior if pixels else Prior)(classes, counts, p.tolist(), np.log(p).tolist(), groups, in_losses)
    write_json(output, asdict(prior))
    return prior


if __name__ == "__main__":
    sys.exit(stage_main(run, "Count the training labels and write the class prior."))

"""Label quality by cleanlab of features and labels in an .npz file; runs in cleanlab's environment, without Tailor.

    python benchmarks/peers/cleanlab_scores.py INPUT.npz OUTPUT.npz

CleanLearning with five folds around scikit-learn's LogisticRegression, as in cleanlab's tutorials for features.
"""

from __future__ import annotations

import sys
import warnings

import cleanlab
import numpy as np
from cleanlab.classification import CleanLearning
from sklearn.linear_model import LogisticRegression

SCALE = 20.0  # of the unit features, so that C = 1 is a weak penalty; chosen on seed 100, which no table has


def main(source: str, target: str) -> None:
    """Write `quality`, float [N]: small for labels that cleanlab finds wrong; and `version`."""
    warnings.filterwarnings("ignore")
    given = np.load(source)
    features = given["features"]
    unit = SCALE * features / np.linalg.norm(features, axis=1, keepdims=True)
    learner = CleanLearning(LogisticRegression(max_iter=60), cv_n_folds=5, seed=0)
    issues = learner.find_label_issues(unit, given["labels"])
    np.savez(target, quality=issues["label_quality"].to_numpy(), version=np.array(cleanlab.__version__))


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Names of models, files and headers that several packages of serving use."""

from __future__ import annotations

from pathlib import Path

STUDENT = "student"
CLASSIFIER = "classifier"
SEGMENTER = "segmenter"  # takes the place of `classifier` in a repository of task segmentation
LABELS_NAME = "labels.txt"
LOCAL_CONFIG = "local"
ADMIN_KEY_VARIABLE = "TAILOR_ADMIN_KEY"
ADMIN_HEADER = "tailor-admin-key"


def image_model(repository: Path) -> str:
    """The model of a repository that takes encoded images: `segmenter` of task segmentation, otherwise `classifier`."""
    return SEGMENTER if (repository / SEGMENTER).is_dir() else CLASSIFIER


def models_of(repository: Path) -> tuple[str, str]:
    """Both models of a repository, in the order in which a server must load them."""
    return STUDENT, image_model(repository)

"""Names of models, files and headers that several packages of serving use."""

from __future__ import annotations

STUDENT = "student"
CLASSIFIER = "classifier"
LABELS_NAME = "labels.txt"
LOCAL_CONFIG = "local"
ADMIN_KEY_VARIABLE = "TAILOR_ADMIN_KEY"
ADMIN_HEADER = "tailor-admin-key"

"""Stored features of texts: classes by name, and damaged or foreign files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from pipeline.shared.errors import ParamsError, StageError
from pipeline.text.stored import (
    FEATURES_FILE,
    INDEX_FILE,
    TextFeatures,
    load_text_features,
    write_no_features,
    write_text_features,
)

NAMES = ("cat", "собака", "金鱼")


def three_classes(**changed: Any) -> TextFeatures:
    """Four rows of three classes: two of the first."""
    rows = np.array([[1, 0], [0.6, 0.8], [0, 1], [-1, 0]], np.float32)
    sentences = ("a cat", "a photo of a cat", "фото: собака", "金鱼")
    text = TextFeatures(rows, np.array([0, 0, 1, 2]), NAMES, sentences, {"encoder": "onnx", "sha256": "0" * 64})
    return replace(text, **changed)


@given(order=st.permutations(range(3)))
def test_rows_follow_the_names_of_their_classes(order: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("text") / "text"
    written = three_classes()
    write_text_features(folder, written)
    loaded = load_text_features(folder, [NAMES[number] for number in order])
    assert (np.diff(loaded.row_class) >= 0).all()

    def of_class(text: TextFeatures, name: str) -> list[tuple[str, list[float]]]:
        rows = np.flatnonzero(text.row_class == text.class_names.index(name))
        return [(text.sentences[row], text.features[row].tolist()) for row in rows]

    assert all(of_class(loaded, name) == of_class(written, name) for name in NAMES)
    assert loaded.record == written.record


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"features": np.full((4, 2), np.nan, np.float32)}, "row 0 of class 'cat' has norm nan"),
        ({"features": np.full((4, 2), 1, np.float32)}, "has norm 1.414, not 1"),
        ({"features": np.ones((4, 2))}, r"float64 \[4, 2\]; expected float32"),
        ({"row_class": np.array([0, 0, 1])}, r"row_class is int64 \[3\]; expected int64 \[4\]"),
        ({"row_class": np.array([0, 0, 0, 2])}, "class 'собака' has no row"),
        ({"row_class": np.array([0, 1, 0, 2])}, "not sorted"),
        ({"row_class": np.array([0, 1, 2, 3])}, "not sorted within 0 to 2"),
        ({"class_names": ("cat", "cat", "fish")}, "a name twice"),
        ({"sentences": ("a cat",)}, "1 sentences for 4 rows"),
    ],
)
def test_features_that_are_not_valid_are_not_written(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=message):
        write_text_features(tmp_path / "text", three_classes(**changed))
    assert not (tmp_path / "text").exists()


def test_classes_of_other_data_are_named(tmp_path: Path) -> None:
    write_text_features(tmp_path / "text", three_classes())
    with pytest.raises(StageError, match="class 'dog' has no text feature"):
        load_text_features(tmp_path / "text", (*NAMES, "dog"))
    with pytest.raises(StageError, match="class '金鱼' has text features, but no images"):
        load_text_features(tmp_path / "text", NAMES[:2])


def test_missing_and_damaged_folders_name_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    with pytest.raises(ParamsError, match="run `dvc repro embed_text` first"):
        load_text_features(folder, NAMES)
    write_no_features(folder)
    with pytest.raises(ParamsError, match="set section text"):
        load_text_features(folder, NAMES)
    write_text_features(folder, three_classes())
    (folder / FEATURES_FILE).write_bytes((folder / FEATURES_FILE).read_bytes()[:-8])
    with pytest.raises(StageError, match="damaged"):
        load_text_features(folder, NAMES)
    safetensors.numpy.save_file({"features": np.eye(3, dtype=np.float32)}, folder / FEATURES_FILE)
    with pytest.raises(StageError, match="damaged"):
        load_text_features(folder, NAMES)
    (folder / INDEX_FILE).write_text(json.dumps([1]))
    with pytest.raises(StageError, match="damaged"):
        load_text_features(folder, NAMES)

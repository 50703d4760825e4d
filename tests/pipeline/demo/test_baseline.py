"""The table of `make demo`: the student against plain cross-entropy, with accuracies computed from predictions."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest

import pipeline.prior
import pipeline.split
import pipeline.student
import pipeline.teacher
from pipeline.data.class_prior import Prior
from pipeline.demo.baseline import CORRECTED, PLAIN, STUDENT_ROW, classification_section, gain_table, limits, run
from pipeline.evaluation.comparison import compare
from pipeline.evaluation.predictions import Predictions
from serving.shared.terminal import Console
from tests.support.making import data_params, folder, params

PRIOR = Prior(["a", "b", "c"], [200, 50, 5], [0.78, 0.2, 0.02], [-0.2, -1.6, -3.9], ["many", "medium", "few"])
LABELS = np.repeat([0, 1, 2], 20)


def answers_right_in(a: int, b: int, c: int) -> Predictions:
    """Return predictions for twenty images per class; incorrect ones predict the next class."""
    right = np.concatenate([np.arange(20) < count for count in (a, b, c)])
    return Predictions(
        [f"{i:02d}" for i in range(60)], LABELS, np.eye(3)[np.where(right, LABELS, (LABELS + 1) % 3)], PRIOR
    )


def printed(table: object) -> str:
    stream = io.StringIO()
    Console(file=stream, width=80).print(table)
    return stream.getvalue()


def row_of(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if name in line)
    return [cell.strip() for cell in line.strip("│┃ \n").split("│")][1:]


def test_the_table_shows_group_accuracies_and_differences_with_intervals_in_80_columns() -> None:
    plain, corrected, student = answers_right_in(20, 12, 2), answers_right_in(18, 14, 8), answers_right_in(18, 16, 11)
    rows = {PLAIN: plain, CORRECTED: corrected, STUDENT_ROW: student}
    measures = {name: compare(one, plain, params().gate, 15) for name, one in rows.items()}
    text = printed(gain_table(measures, plain, 0.95))
    assert row_of(text, PLAIN) == ["56.7 %", "100.0 %", "60.0 %", "10.0 %"]
    assert row_of(text, STUDENT_ROW) == ["75.0 %", "90.0 %", "80.0 %", "55.0 %"]
    assert row_of(text, "difference") == ["+18.3", "-10.0", "+20.0", "+45.0"]
    low, high = map(float, row_of(text, "95 % interval")[3].split(" to "))
    assert 15 < low < 45 < high < 75
    assert "60 images" in text and text.count("20 images") == 3
    assert len(text.splitlines()) <= 12 and max(map(len, text.splitlines())) <= 80


def test_a_group_without_test_images_has_no_accuracy() -> None:
    plain = Predictions(["0", "1"], np.array([0, 1]), np.eye(3)[[0, 1]], PRIOR)
    measures = dict.fromkeys((PLAIN, CORRECTED, STUDENT_ROW), compare(plain, plain, params().gate, 15))
    assert row_of(printed(gain_table(measures, plain, 0.95)), PLAIN) == ["100.0 %", "100.0 %", "100.0 %", "n/a"]


def test_the_limits_name_images_classes_and_that_there_is_one_seed() -> None:
    text = limits(7, PRIOR, 60)
    for part in (
        "epochs (7)",
        "255 training images of 3 classes",
        "200 of the largest and 5 of",
        "One seed and 60 test",
    ):
        assert part in text


def test_plain_cross_entropy_has_the_students_recipe_without_adjustment() -> None:
    chosen = params(
        {"student.epochs": 7, "student.learning_rate": 0.03, "student.augment.cutout": 3, "teacher.epochs": 9}
    )
    plain = classification_section(chosen.student, adjustment=0.0)
    expected = {**chosen.student.model_dump(), "adjustment": 0.0}
    assert plain.model_dump() == {key: expected[key] for key in plain.model_dump()}


@pytest.mark.slow
def test_plain_cross_entropy_is_trained_once_and_evaluated_on_the_same_test_images(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    base = data_params(folder(tmp_path / "images", {"a": 18, "b": 12, "c": 9})).model_dump(mode="json")["data"]
    short = {f"{stage}.{key}": value for stage in ("teacher", "student") for key, value in
             {"epochs": 1, "batch_size": 8, "learning_rate": 0.01}.items()}  # fmt: skip
    chosen = params({**{f"data.{key}": value for key, value in base.items()}, **short, "student.queue_total": 24})
    for stage in (pipeline.split, pipeline.prior, pipeline.teacher, pipeline.student):
        stage.run(chosen)
    capsys.readouterr()
    result = run(chosen)
    first = capsys.readouterr().out
    assert "teacher  epoch 1/1" in first and PLAIN in first and "One seed" in first
    assert "warning: all: " in first and "fewer than 100" in first
    assert json.loads((result.output / "config.json").read_text())["adjustment"] == 0
    assert run(chosen) == result
    assert capsys.readouterr().out == first.partition("\n")[2]

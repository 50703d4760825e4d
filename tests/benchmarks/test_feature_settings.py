"""benchmarks.feature_settings: rows, their params, and differences to the first row; nothing is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import feature_settings
from benchmarks.encoder_projects import GML_STUDENT, project_params
from benchmarks.feature_settings import changed, row_of, table


def test_a_row_is_the_recipe_or_the_gml_student_with_its_changes():
    recipe = project_params("plankton", Path("data"), "efficientnet_lite0", 112)
    row, changes = row_of(["teacher", "teacher.batch_size=512", "teacher.learning_rate=2"])
    params = changed(recipe, "teacher", changes)
    assert row.name == "teacher teacher.batch_size=512 teacher.learning_rate=2" and row.sections == ("teacher",)
    assert (params.teacher.batch_size, params.teacher.learning_rate) == (512, 2)
    assert params.student == recipe.student and params.teacher.epochs == recipe.teacher.epochs
    row, changes = row_of(["student", "student.adapter=32", "student.contrast.kind=gml"])
    params = changed(recipe, "student", changes)
    assert row.sections == ("teacher", "student") and params.teacher == recipe.teacher
    assert (params.student.adapter, params.student.batch_size) == (32, GML_STUDENT["batch_size"])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["teachers"], "'teachers' is unknown; expected teacher, adapter, student"),
        (["teacher", "epochs=3"], "'epochs=3'; expected section.key=value"),
        (["teacher", "teacher.epochs"], "'teacher.epochs'; expected section.key=value"),
        (["teacher", "teacher.epoch=3"], "teacher.epoch"),
        (["teacher", "teacher.epochs=0"], "teacher.epochs"),
    ],
)
def test_a_row_that_does_not_fit_is_a_usage_error_before_anything_is_computed(row, message, tmp_path, capsys):
    command = ["plankton", "--data", str(tmp_path), "--work", str(tmp_path / "work"), "--row", *row]
    with pytest.raises(SystemExit, match="2"):
        feature_settings.main(command)
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "work").exists()


def test_differences_are_paired_by_seed_and_read_from_validation():
    def run(value: float) -> dict:
        validation = {"all": value, "many": value, "medium": value, "few": None, "images": value}
        return {"validation": validation, "test": dict.fromkeys(validation, 0.99), "seconds": 3.0}

    printed = table({"teacher": [run(0.5), run(0.7)], "student": [run(0.51), run(0.71)]}).splitlines()
    assert "| teacher | 60.00 ± 14.14 |" in printed[2] and "99" not in "".join(printed)
    assert "| +1.00 (+1.00 to +1.00) |  | 3 |" in printed[3]  # paired: without spread; few is not known

"""The recipe command: an overlay's values in params.yaml, comments kept, nothing half-done."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.errors import ParamsError
from pipeline.params import load_params
from pipeline.recipe import apply_recipe, main

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture
def params(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    return path


def overlay(tmp_path, text: str) -> Path:
    path = tmp_path / "overlay.yaml"
    path.write_text(text)
    return path


def test_a_recipe_changes_its_keys_and_keeps_every_other_value_and_comment(params, tmp_path):
    before = params.read_text()
    assert (
        main(
            [str(overlay(tmp_path, "student: {tau_g: 0.07}\nimage: {mean: [0.1, 0.2, 0.3]}")), "--params", str(params)]
        )
        == 0
    )
    after = load_params(params)
    assert after.student.tau_g == 0.07 and after.image.mean == [0.1, 0.2, 0.3]
    expected = yaml.safe_load(before)
    expected["student"]["tau_g"] = 0.07
    expected["image"]["mean"] = [0.1, 0.2, 0.3]
    assert yaml.safe_load(params.read_text()) == expected
    assert {line.partition("#")[2] for line in before.splitlines()} == {
        line.partition("#")[2] for line in params.read_text().splitlines()
    }


def test_a_recipe_with_the_values_already_there_changes_no_byte(params, tmp_path, capsys):
    before = params.read_bytes()
    assert main([str(overlay(tmp_path, "student: {tau_g: 0.1}")), "--params", str(params)]) == 0
    assert params.read_bytes() == before
    assert "has these values already" in capsys.readouterr().out


def test_later_overlays_win(params, tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("student: {epochs: 7, alpha: 0.0}")
    second.write_text("student: {epochs: 9}")
    text, lines = apply_recipe([first, second], params)
    student = yaml.safe_load(text)["student"]
    assert (student["epochs"], student["alpha"]) == (9, 0.0)
    assert lines == ["student.epochs: 40 → 7", "student.alpha: 1.0 → 0.0", "student.epochs: 7 → 9"]


def test_a_dry_run_says_what_would_change_and_writes_nothing(params, tmp_path, capsys):
    before = params.read_bytes()
    assert main([str(overlay(tmp_path, "seed: 5")), "--params", str(params), "--dry-run"]) == 0
    assert capsys.readouterr().out == "seed: 0 → 5\n"
    assert params.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("student: {tau_gg: 0.07}", "student.tau_gg is not a key; did you mean student.tau_g?"),
        ("student: {tau_g: -1}", "student.tau_g is -1"),
        ("- 1", "holds list"),
        ("student: [", "not readable as YAML"),
    ],
)
def test_a_bad_recipe_is_one_line_exit_2_and_leaves_params_alone(params, tmp_path, capsys, text, said):
    before = params.read_bytes()
    assert main([str(overlay(tmp_path, text)), "--params", str(params)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "overlay.yaml" in error
    assert params.read_bytes() == before


def test_a_missing_recipe_names_the_file(params, capsys):
    assert main(["recipes/none.yaml", "--params", str(params)]) == 2
    assert "recipes/none.yaml: No such file or directory" in capsys.readouterr().err


def test_debug_shows_where_the_error_came_from(params, tmp_path):
    with pytest.raises(ParamsError):
        main([str(overlay(tmp_path, "- 1")), "--params", str(params), "--debug"])


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_every_recipe_of_the_project_applies_to_its_params(params, path):
    base = ROOT / "recipes/cifar10-if100.yaml"
    text, lines = apply_recipe([base, path], params)
    assert lines and yaml.safe_load(text)["student"]["epochs"] >= 1

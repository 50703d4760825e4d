"""`tailor recipe`: merges an overlay into params.yaml, keeps comments, and writes all changes or none."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from ruamel.yaml import YAML

from pipeline.commands.app import main
from pipeline.params import EncoderParams, load_params
from pipeline.params.recipe import RECIPES, apply_recipe, find_recipe
from pipeline.preparation.first_params import suggest_params, write_text
from pipeline.preparation.folder_summary import FolderSummary

ROOT = Path(__file__).parents[3]


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
            [
                "recipe",
                str(overlay(tmp_path, "student: {tau_g: 0.07}\nimage: {mean: [0.1, 0.2, 0.3]}")),
                "--params",
                str(params),
            ]
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


def test_a_recipe_with_the_existing_values_changes_no_byte(params, tmp_path, capsys):
    before = params.read_bytes()
    assert main(["recipe", str(overlay(tmp_path, "student: {tau_g: 0.1}")), "--params", str(params)]) == 0
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


def test_a_recipe_with_an_encoder_writes_all_its_keys_so_that_dvc_can_change_each(params):
    text, _ = apply_recipe([ROOT / "recipes/photographs-lite0.yaml"], params)
    assert set(yaml.safe_load(text)["encoder"]) == set(EncoderParams.model_fields)
    assert "\nencoder:\n  name: efficientnet_lite0\n" in text
    params.write_text(text)
    assert apply_recipe([ROOT / "recipes/photographs-lite0.yaml"], params) == (text, [])


def test_a_dry_run_prints_the_changes_and_writes_nothing(params, tmp_path, capsys):
    before = params.read_bytes()
    assert main(["recipe", str(overlay(tmp_path, "seed: 5")), "--params", str(params), "--dry-run"]) == 0
    assert capsys.readouterr().out == "seed: 0 → 5\n"
    assert params.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "error_text"),
    [
        ("student: {tau_gg: 0.07}", "student.tau_gg is not a key; did you mean student.tau_g?"),
        ("student: {tau_g: -1}", "student.tau_g is -1"),
        ("- 1", "holds list"),
        ("student: [", "not readable as YAML"),
    ],
)
def test_a_bad_recipe_is_one_line_with_exit_2_and_leaves_params_unchanged(params, tmp_path, capsys, text, error_text):
    before = params.read_bytes()
    assert main(["recipe", str(overlay(tmp_path, text)), "--params", str(params)]) == 2
    error = capsys.readouterr().err
    assert error_text in error and error.count("\n") == 1 and "overlay.yaml" in error
    assert params.read_bytes() == before


@pytest.mark.parametrize("command", [["recipe", "{}", "--params", "params.yaml"], ["new", "trees", "--recipe", "{}"]])
def test_a_recipe_that_does_not_exist_is_refused_with_a_like_name_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, command
):
    monkeypatch.chdir(tmp_path)
    assert main([word.format("recipes/camvid.yaml") for word in command]) == 2
    error = capsys.readouterr().err
    assert "recipes/camvid.yaml: no such recipe" in error and error.endswith("such as recipes/camvid-cpu.yaml\n")
    assert not list(tmp_path.iterdir())


def test_a_recipe_of_tailor_needs_no_folder_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(Path("methods/bcl.yaml")) == RECIPES / "methods/bcl.yaml"
    assert find_recipe(Path("camvid-cpu.yaml")) == find_recipe(Path("recipes/camvid-cpu.yaml"))


def files(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)


def test_an_overlay_overrides_the_file_it_extends_and_prints_only_the_result(params, tmp_path):
    files(
        tmp_path,
        base="student: {epochs: 7, alpha: 0.0}\ndata: {table: {id: name}}",
        other="student: {epochs: 8, beta: 2.0}",
        child="extends: [base.yaml, other.yaml]\nstudent: {alpha: 0.5}\ndata: {table: {id: null}}",
        grandchild="extends: child.yaml\nstudent: {gamma: 0.5}",
    )
    text, lines = apply_recipe([tmp_path / "grandchild.yaml"], params)
    made = yaml.safe_load(text)
    assert {key: made["student"][key] for key in ("epochs", "alpha", "beta", "gamma")} == {
        "epochs": 8, "alpha": 0.5, "beta": 2.0, "gamma": 0.5,
    }  # fmt: skip
    assert made["data"]["table"]["id"] is None and "extends" not in made
    assert sorted(lines) == [
        "student.alpha: 1.0 → 0.5",
        "student.beta: 1.0 → 2.0",
        "student.epochs: 40 → 8",
        "student.gamma: 1.0 → 0.5",
    ]


def test_a_file_extended_twice_is_applied_once(params, tmp_path):
    files(
        tmp_path,
        base="student: {epochs: 7, alpha: 0.0}",
        change="student: {epochs: 8}",
        child="extends: base.yaml\nstudent: {beta: 2.0}",
    )
    base, change, child = (tmp_path / f"{name}.yaml" for name in ("base", "change", "child"))
    student = yaml.safe_load(apply_recipe([base, change, child], params)[0])["student"]
    assert (student["epochs"], student["alpha"], student["beta"]) == (8, 0.0, 2.0)
    # Allowed, since the user names it again.
    assert yaml.safe_load(apply_recipe([base, change, base], params)[0])["student"]["epochs"] == 7


@pytest.mark.parametrize(
    ("text", "error_text"),
    [
        ("extends: 3", "overlay.yaml: extends is 3; expected a file name or a list of them"),
        ("extends: [base.yaml, 3]", "expected a file name or a list of them"),
        ("extends: {base: 1}", "expected a file name or a list of them"),
        ("extends: nowhere.yaml", "overlay.yaml: extends is 'nowhere.yaml', but there is no file"),
        ("extends: overlay.yaml", "overlay.yaml: extends is 'overlay.yaml', which itself extends this file"),
        ("extends: round.yaml", "round.yaml: extends is 'overlay.yaml', which itself extends this file"),
        ("extends: listed.yaml", "listed.yaml: holds list"),
        ("extends: base.yaml\nstudnt: {}", "studnt is not a key; did you mean student?"),
    ],
)
def test_a_bad_extends_is_one_line_with_exit_2_and_leaves_params_unchanged(params, tmp_path, capsys, text, error_text):
    files(tmp_path, base="seed: 1", round="extends: overlay.yaml", listed="- 1")
    before = params.read_bytes()
    assert main(["recipe", str(overlay(tmp_path, text)), "--params", str(params)]) == 2
    error = capsys.readouterr().err
    assert error_text in error and error.count("\n") == 1
    assert params.read_bytes() == before


@pytest.mark.parametrize("form", ["block lists", "as dvc exp run -S writes it"])
def test_lists_over_several_lines_are_edited_by_recipe_and_init_alike(params, tmp_path, form):
    delivered = params.read_text(encoding="utf-8")
    if form == "block lists":
        written = yaml.safe_dump(yaml.safe_load(delivered), sort_keys=False)
    else:
        editor, stream = YAML(), io.StringIO()
        document = editor.load(delivered)
        document["seeds"], document["student"]["augment"]["crop_scale"] = [1, 2], [0.1, 1.0]
        document["data"]["table"]["class_names"] = ["a", "b"]
        editor.dump(document, stream)
        written = stream.getvalue()
        assert "seeds:    # additional seeds" in written
    params.write_text(written, encoding="utf-8")
    text = "image: {mean: [0.1, 0.2, 0.3]}\nseeds: [3]\nstudent: {augment: {crop_scale: [0.3, 1.0]}}\n"
    assert main(["recipe", str(overlay(tmp_path, text)), "--params", str(params)]) == 0
    after = load_params(params)
    assert (after.seeds, after.image.mean, after.student.augment.crop_scale) == ([3], [0.1, 0.2, 0.3], [0.3, 1.0])
    if form != "block lists":
        assert "seeds: [3] # additional seeds" in params.read_text(encoding="utf-8")
    summary = FolderSummary(["a", "b"], [300, 30], False, False, 400, [])
    chosen = suggest_params(summary, "photos", gpu=False)
    content = yaml.safe_load(write_text(written, chosen)[0])
    assert content["data"]["location"] == "photos" and content["image"]["mean"] == [0.485, 0.456, 0.406]
    assert content["gate"] == yaml.safe_load(written)["gate"]


@pytest.mark.parametrize("form", ["braces", "aliases"])
def test_sections_in_braces_or_aliases_are_edited_by_init(form):
    content = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    if form == "aliases":
        content["student"] |= {key: content["teacher"][key] for key in ("schedule", "augment")}
    template = yaml.safe_dump(content, default_flow_style=form == "braces", sort_keys=False, width=10**6)
    chosen = {"student.schedule.warmup_epochs": (2, "x"), "data.source": ("folder", "y")}
    text, changed = write_text(template, chosen)
    content["student"]["schedule"] = content["student"]["schedule"] | {"warmup_epochs": 2}
    content["data"]["source"] = "folder"
    assert yaml.safe_load(text) == content and changed.student.schedule.warmup_epochs == 2

"""The catalogue of methods: its overlays, its costs, and what does not apply to a project."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from models.prior import class_prior, log_class_prior
from pipeline.data.class_prior import Prior
from pipeline.methods import comparison
from pipeline.methods.catalogue import METHODS, PROJECT, find_methods, params_of
from pipeline.methods.comparison import Project, check_method
from pipeline.methods.cost import Cost, Served, training_cost
from pipeline.methods.networks import Trained, network_of, read_record
from pipeline.params.recipe import RECIPES, flat
from pipeline.shared.errors import ParamsError
from tests.support.making import ROOT, params
from tests.support.small_encoder import tiny_encoder, tiny_params

NAMES = [method.name for method in METHODS]
SMALL = {
    "image.size": 8, "image.resize_to": 8, "teacher.epochs": 2, "student.epochs": 3, "student.batch_size": 8,
    "student.queue_total": 30, "classifier.kind": "tau_norm", "classifier.tau": 0.5,
}  # fmt: skip
COUNTS = [30, 12, 8]


def small_prior() -> Prior:
    p = class_prior(COUNTS, 0.0)
    return Prior(["a", "b", "c"], COUNTS, p.tolist(), log_class_prior(COUNTS).tolist(), ["medium", "few", "few"])


def test_each_method_has_an_overlay_and_each_overlay_a_row() -> None:
    assert len(set(NAMES)) == len(NAMES) and PROJECT.name not in NAMES
    assert {path.stem for path in (RECIPES / "methods").glob("*.yaml")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_overlay_applies_to_the_default_recipe_whatever_was_set_before(name: str) -> None:
    (method,) = find_methods([name])
    made = params_of(method, params(SMALL))
    assert (made.classifier.kind != "none") == (method.kind == "second stage" or name.endswith("_encoder"))
    assert made.classifier.tau is None and made.student.epochs == 3


@pytest.mark.parametrize("name", [method.name for method in METHODS if method.kind != "second stage"])
def test_the_listed_cost_of_a_step_is_the_measured_one(name: str) -> None:
    (method,) = find_methods([name])
    made = params_of(method, params(SMALL))
    cost = training_cost(made, "student", small_prior(), None)
    images = 3 * (sum(COUNTS) // 8) * 8
    assert (cost.trained, cost.forward) == (method.trained * images, method.forward * images)


def test_multiply_accumulates_are_those_of_the_network_forward_and_backward() -> None:
    # A cosine classifier on stored features: 6 values to 3 classes, forward and the gradient of the weight.
    (method,) = find_methods(["cross_entropy"])
    made = params_of(method, params({**SMALL, "student.epochs": 1}))
    features = {"name": "made", "model": "made", "sha256": "0" * 64, "size": 8, "width": 6}
    cost = training_cost(made, "student", small_prior(), features)
    assert cost.macs in (48 * 6 * 3 * 2, 48 * 6 * 3 * 3)


def test_an_unknown_method_is_refused_with_the_nearest_names() -> None:
    with pytest.raises(ParamsError, match=r"'tau-norm' is no method; did you mean tau_norm"):
        find_methods(["gml", "tau-norm"])
    with pytest.raises(ParamsError, match="--methods is empty"):
        find_methods([])


def test_all_and_project_and_overlays_of_the_caller_are_methods(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text(f"extends: {ROOT / 'recipes/methods/crt.yaml'}\nclassifier: {{epochs: 2}}\n", encoding="utf-8")
    found = find_methods(["project", "all", "gml", str(own)])
    assert [method.name for method in found] == ["project", *NAMES, "mine"]
    base = params(SMALL)
    assert params_of(found[0], base) is base
    assert (params_of(found[-1], base).classifier.kind, params_of(found[-1], base).classifier.epochs) == ("crt", 2)
    other = own.rename(tmp_path / "gml.yaml")
    with pytest.raises(ParamsError, match="two methods have the name 'gml'"):
        find_methods(["gml", str(other)])


def test_an_overlay_that_changes_a_stage_before_the_training_is_refused(tmp_path: Path) -> None:
    for section, text in {"prior": "prior: {smoothing: 5}", "data": "data: {seed: 9}", "seed": "seed: 9"}.items():
        own = tmp_path / f"{section}.yaml"
        own.write_text(f"extends: {ROOT / 'recipes/methods/gml.yaml'}\n{text}\n", encoding="utf-8")
        with pytest.raises(
            ParamsError, match=rf"{section}\.yaml: sets another {section}, but all methods of a comparison"
        ):
            params_of(*find_methods([str(own)]), params(SMALL))
    with pytest.raises(ParamsError, match=r"^nofile\.yaml: no such recipe"):
        params_of(*find_methods(["nofile.yaml"]), params(SMALL))


@pytest.mark.parametrize("name", NAMES)
def test_an_overlay_resets_what_another_method_set_except_for_the_keys_that_the_docs_name(name: str) -> None:
    plain, base = find_methods(["cross_entropy"])[0], params({**SMALL, "student.tau_s": 0.05})
    after, alone = (
        flat(params_of(plain, made).model_dump()) for made in (params_of(find_methods([name])[0], base), base)
    )
    stay = {
        f"student.{key}" for key in ("projection_dim", "projection_hidden", "augment.mix", "augment.mix_alpha", "tau_s")
    }
    assert {key for key in {*after, *alone} if after.get(key) != alone.get(key)} <= stay


def test_a_method_with_a_second_batch_is_refused_where_images_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "count_rows", lambda _split: sum(COUNTS))
    project = Project(params({**SMALL, "stream.mode": "on"}), small_prior(), np.zeros(1, int), "data")
    for name in ("bbn", "hybrid_sc", "concutmix"):
        with pytest.raises(ParamsError, match=f"{name} does not apply to this project: stream.mode is on"):
            check_method(*find_methods([name]), project)
    check_method(*find_methods(["bcl"]), project)


def test_a_network_counts_as_finished_with_its_weights_and_a_valid_record(tmp_path: Path) -> None:
    network = network_of(params_of(find_methods(["cross_entropy"])[0], params(SMALL)), "data")
    record, weights = (tmp_path / network.name / name for name in ("record.json", "student/model.safetensors"))
    weights.parent.mkdir(parents=True)
    made = Trained(network.recipe, "student", 1.0, 2.0, Cost(1, 2, 3), Served(4, 5))
    for damaged in ("", "[]", "{}", json.dumps({**asdict(made), "cost": 3})):
        record.write_text(damaged, encoding="utf-8")
        weights.write_bytes(b"weights")
        assert read_record(network, tmp_path) is None
    record.write_text(json.dumps(asdict(made)), encoding="utf-8")
    assert read_record(network, tmp_path) == made
    weights.unlink()
    assert read_record(network, tmp_path) is None


def test_an_overlay_of_a_project_may_extend_a_recipe_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "extends: recipes/methods/balanced_softmax.yaml\nstudent: {epochs: 9}\n"
    Path("longer.yaml").write_text(text, encoding="utf-8")
    made = params_of(*find_methods(["longer.yaml"]), params(SMALL))
    assert (made.student.adjustment, made.student.beta, made.student.epochs) == (1.0, 0.0, 9)


def test_a_method_that_a_frozen_encoder_cannot_train_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tiny_params(tiny_encoder(tmp_path, monkeypatch), tmp_path, {"student.adapter": 0})
    for name, reason in {"gml": "student.adapter is 0", "mislas_mixup": "student.augment.mix is 'mixup'"}.items():
        with pytest.raises(ParamsError, match=f"{name} does not apply to this project: .*{reason}"):
            params_of(*find_methods([name]), made)
    assert params_of(*find_methods(["crt"]), made).classifier.kind == "crt"


def test_a_network_is_shared_by_the_methods_that_train_it_alike() -> None:
    base = params(SMALL)
    networks = {name: network_of(params_of(*find_methods([name]), base), "data") for name in NAMES}
    assert networks["cross_entropy"].name == networks["post_hoc"].name == networks["crt"].first.name
    assert networks["crt"].name != networks["lws"].name
    assert [each.stage for each in networks["gml"].chain] == ["teacher", "student"]
    assert networks["gml"].first.name == networks["kd"].first.name
    assert networks["gml_without_teacher"].first is None
    other = network_of(params_of(*find_methods(["gml"]), base), "other data")
    assert other.name != networks["gml"].name and other.recipe == networks["gml"].recipe

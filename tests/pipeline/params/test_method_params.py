"""Sections that are chosen by `kind`: messages, refused combinations, and overlays that change the kind."""

from __future__ import annotations

import importlib.util

import pytest
import yaml

from models.losses.class_loss import LADELoss, LDAMLoss
from pipeline.data.class_prior import Prior
from pipeline.params.recipe import apply_recipe
from pipeline.shared.errors import ParamsError
from pipeline.training.method_setup import class_loss, contrast_term
from tests.support.making import ROOT, params

METHODS = ROOT / "recipes/methods"
COUNTS = [50, 12, 3]
PRIOR = Prior(["a", "b", "c"], COUNTS, [0.5, 0.3, 0.2], [-0.7, -1.2, -1.6], ["many", "medium", "few"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.loss": {"kind": "focal", "gama": 2}}, "student.loss.gama is not a key; did you mean student.loss.gam"),
        ({"student.loss": {"kind": "focal", "gamma": -1}}, "student.loss.gamma is -1; input should be greater"),
        ({"student.loss": {"kind": "hinge"}}, "student.loss: input tag 'hinge' found using 'kind' does not match"),
        (
            {"student.loss": {"kind": "lade"}, "student.accumulate": 2},
            "student: accumulate is 2, but loss.kind lade has a term of the whole batch; set accumulate: 1",
        ),
        ({"teacher.loss": {"kind": "lade"}, "teacher.augment.mix": "cutmix"}, "teacher: augment.mix is cutmix"),
        (
            {"student.loss": {"kind": "ldam"}, "student.classifier": {"kind": "linear"}},
            "student: loss.kind is ldam, whose margins are cosines, but classifier.kind is linear",
        ),
        ({"student.loss": {"kind": "sigmoid_focal"}}, "student: adjustment is 1, but loss.kind sigmoid_focal has no logit"),
        (
            {"student.loss": {"kind": "cross_entropy", "class_balance": 0.99}},
            "student: adjustment is 1, but loss.kind cross_entropy has class weights, which balance it too; set adjus",
        ),
        (
            {"student.loss": {"kind": "ldam", "average": "weights"}, "student.accumulate": 2},
            "student: accumulate is 2, but loss.average is weights",
        ),
    ],
)  # fmt: skip
def test_a_loss_that_does_not_fit_is_refused_with_what_to_change(changes, message):
    with pytest.raises(ParamsError) as error:
        params(changes)
    assert str(error.value).partition(": ")[2].startswith(message)


OWN = {"student.contrast_encoder": "self"}
EXPERTS = {"student.experts": {"kind": "ride"}, "student.alpha": 0.0, "student.beta": 0.0}
MOMENTUM = {"student.contrast_encoder": "momentum"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"student.contrast": {"kind": "bcl"}},
            "student: contrast_encoder is teacher, but contrast.kind bcl takes self; set contrast_encoder: self",
        ),
        (OWN, "student.contrast_encoder is self, but task classification has it for other kinds than gml; set it to"),
        (
            {**OWN, "student.contrast": {"kind": "supcon"}, "student.accumulate": 2},
            "student: accumulate is 2, but contrast.kind supcon compares the whole batch; set accumulate: 1",
        ),
        (
            {**MOMENTUM, "student.contrast": {"kind": "paco"}, "student.augment.mix": "mixup"},
            "student: augment.mix is mixup, but contrast.kind paco compares the classifier view",
        ),
        (
            {**OWN, "student.contrast": {"kind": "gpaco"}, "student.adjustment": 0.0, "student.alpha": 0.0},
            "student: adjustment is 0 and loss.kind is cross_entropy, but contrast.kind gpaco adds the log prior to the class "
            "logits; set adjustment: 1.0",
        ),
        (
            {**EXPERTS, "student.loss": {"kind": "lade"}},
            "student: loss.kind is lade, whose regulariser is of one network's batch, but experts.kind is ride; set another",
        ),
        (
            {**MOMENTUM, "student.contrast": {"kind": "kcl", "queue": 10}},
            "student: contrast.queue is 10, below batch_size 32; set it to 32 or more",
        ),
        (
            {**OWN, "student.contrast": {"kind": "hybrid_sc"}, "student.alpha": 0.0},
            "student: adjustment is 1.0, but contrast.kind is hybrid_sc, which draws a second, class-balanced batch; set "
            "adjustment: 0.0",
        ),
        (
            {**OWN, "student.contrast": {"kind": "hybrid_sc"}, "student.adjustment": 0.0, "student.alpha": 1.0},
            "student: alpha is 1.0, but contrast.kind is hybrid_sc",
        ),
        (
            {
                **OWN, "student.contrast": {"kind": "hybrid_sc"}, "student.adjustment": 0.0, "student.alpha": 0.0,
                "student.loss": {"kind": "focal", "class_balance": 0.99},
            },
            "student: loss.kind focal has class weights, but contrast.kind is hybrid_sc, whose L_cls has a class-balanced "
            "batch; set loss: {kind: cross_entropy}",
        ),
        (
            {
                **OWN, "student.contrast": {"kind": "hybrid_sc"}, "student.adjustment": 0.0, "student.alpha": 0.0,
                "student.loss": {"kind": "lade"},
            },
            "student: loss.kind lade has the class prior, but contrast.kind is hybrid_sc",
        ),
        (
            {**OWN, "student.contrast": {"kind": "concutmix"}, "student.alpha": 0.0, "student.augment.mix": "cutmix"},
            "student: augment.mix is cutmix, but contrast.kind is concutmix, which draws a second, class-balanced batch",
        ),
        (
            {**OWN, "student.contrast": {"kind": "concutmix"}, "student.alpha": 0.0, "student.loss": {"kind": "smoothing"}},
            "student: loss.kind is smoothing, but contrast.kind is concutmix, which has its own cross-entropy; set loss: {kind",
        ),
        (
            {**MOMENTUM, "student.contrast": {"kind": "tsc", "queue": 10}},
            "student: contrast.queue is 10, below batch_size",
        ),
        (
            {**OWN, "student.contrast": {"kind": "proco"}, "student.projection_dim": 2},
            "student: projection_dim is 2; contrast.kind proco needs at least 3",
        ),
        *(
            (
                {**OWN, "student.contrast": {"kind": "bcl"}, **{f"student.augment.{key}": views[key] for key in views}},
                "student.contrast.kind is bcl, which compares two views of an image, but student.augment makes them equal",
            )
            for views in (
                {"crop_padding": 0},
                {"crop_padding": 0, "policy": "autoaugment", "contrast_policy": "none"},
                {"crop": "resized", "crop_scale": [1.0, 1.0]},
            )
        ),
        (
            {"student.gamma": 0.0, "student.alpha": 0.0, "classifier": {"kind": "lws"}},
            "student.gamma and student.alpha are both 0, so no term trains the classifier; set one of them above 0",
        ),
        ({"student.contrast": {"kind": "crd", "rate": 2}}, "student.contrast.rate is 2; input should be less"),
    ],
)  # fmt: skip
def test_a_contrast_term_that_does_not_fit_is_refused_with_what_to_change(changes, message):
    with pytest.raises(ParamsError) as error:
        params(changes)
    assert str(error.value).partition(": ")[2].startswith(message)


def test_a_pretraining_that_does_not_fit_is_refused_with_what_to_change():
    with pytest.raises(ParamsError, match="pretraining is rotation, but experts is set too; set experts: null"):
        params({**EXPERTS, "student.pretraining": "rotation"})
    weights = {"file": "a.safetensors", "sha256": "0" * 64}
    with pytest.raises(ParamsError, match="but pretrained is set too; set pretrained: null, or pretraining: none"):
        params({"student.pretraining": "rotation", "student.pretrained": weights})


def test_tsc_without_scipy_is_refused_with_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    student = params({**MOMENTUM, "student.contrast": {"kind": "tsc"}}).student
    with pytest.raises(ParamsError, match=r"contrast\.kind is tsc, which needs scipy; run `pip install scipy`"):
        contrast_term(student, PRIOR, 64, 64)


def test_the_logits_of_hybrid_sc_count_as_balanced():
    student = params(yaml.safe_load(apply_recipe([METHODS / "hybrid_sc.yaml"], ROOT / "params.yaml")[0])).student
    assert student.assumed_adjustment is None


def test_a_term_of_weight_0_is_not_checked():
    assert params({"student.contrast": {"kind": "bcl"}, "student.beta": 0.0}).student.contrast.kind == "bcl"


@pytest.mark.parametrize("classifier", [{"kind": "crt"}, {"kind": "lws", "start": "linear"}])
def test_the_encoder_alone_is_trained_for_a_second_stage_that_fits_a_new_classifier(classifier):
    made = params({"student.gamma": 0.0, "student.alpha": 0.0, "classifier": classifier})
    assert not made.student.trains_classifier


def test_crd_of_one_class_is_refused_with_its_key():
    one = Prior(["a", "b"], [9, 0], [0.9, 0.1], [-0.1, -2.3], ["few", "few"])
    student = params({"student.contrast": {"kind": "crd"}}).student
    with pytest.raises(ParamsError, match=r"student.contrast.kind is crd, but labels contain one class only"):
        contrast_term(student, one, 64, 64)


def test_an_overlay_with_another_kind_replaces_the_keys_of_the_old_kind_and_one_of_the_same_kind_adds(tmp_path):
    target, more = tmp_path / "params.yaml", tmp_path / "more.yaml"
    target.write_text((ROOT / "params.yaml").read_text())
    target.write_text(apply_recipe([METHODS / "ldam_drw.yaml"], target)[0])
    more.write_text("student: {loss: {kind: ldam, after: 0.5}}")
    student = yaml.safe_load(apply_recipe([more], target)[0])["student"]
    assert (student["loss"]["margin"], student["loss"]["after"]) == (0.5, 0.5)
    text, _ = apply_recipe([METHODS / "focal.yaml"], target)
    assert yaml.safe_load(text)["student"]["loss"] == {"kind": "focal", "gamma": 1.0}


@pytest.mark.parametrize("path", sorted(METHODS.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_method_is_valid_alone_and_on_a_recipe_of_the_paper(path):
    for recipes in ([path], [ROOT / "recipes/cifar100-if100-200.yaml", path]):
        made = params(yaml.safe_load(apply_recipe(recipes, ROOT / "params.yaml")[0]))
        assert class_loss(made.student, PRIOR).log_prior.tolist() == pytest.approx(PRIOR.log_prior)
        if made.student.beta and made.student.contrast.kind != "gml":
            term = contrast_term(made.student, PRIOR, 64, 64)
            assert term.encoder == made.student.contrast_encoder


LARGE = {"imagenet-lt": "imagenet-lt-90", "inaturalist2018": "inaturalist2018-100"}
TRAINING_KEYS = ("epochs", "batch_size", "learning_rate", "weight_decay", "schedule", "backbone")


@pytest.mark.parametrize("path", sorted(METHODS.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_an_overlay_of_a_large_data_set_changes_values_of_the_method_alone_and_says_where_they_are_from(path):
    recipe = ROOT / f"recipes/{LARGE[path.parent.name]}.yaml"
    own, base = (
        params(yaml.safe_load(apply_recipe([recipe, overlay], ROOT / "params.yaml")[0]))
        for overlay in (path, METHODS / path.name)
    )
    assert own != base
    for key in TRAINING_KEYS:
        assert getattr(own.student, key) == getattr(base.student, key), key
    assert own.teacher == base.teacher
    text = path.read_text()
    changed = [line for line in text.splitlines() if ": " in line and not line.startswith(("#", "extends"))]
    assert all(" # " in line for line in changed if not line.strip().startswith("kind: crt")), (
        "a value without its source"
    )
    assert changed or "Not verified" in text or path.stem in ("gpaco", "proco")


def test_values_of_large_data_sets_are_those_of_the_authors_code():
    def made(*names):
        paths = [ROOT / f"recipes/{name}.yaml" for name in names]
        return params(yaml.safe_load(apply_recipe(paths, ROOT / "params.yaml")[0]))

    bcl = made("imagenet-lt-90", "methods/imagenet-lt/bcl").student
    assert (bcl.gamma, bcl.beta, bcl.contrast.temperature, bcl.projection_hidden, bcl.projection_dim) == (
        1.0, 0.35, 0.07, 2048, 1024,
    )  # fmt: skip
    paco = made("inaturalist2018-100", "methods/inaturalist2018/paco").student
    assert (paco.contrast.temperature, paco.contrast.alpha, paco.contrast.queue) == (0.2, 0.05, 8192)
    ride = made("inaturalist2018-100", "methods/inaturalist2018/ride").student.experts
    assert (ride.diversity, ride.reweight, ride.count) == (0.2, 0.015, 3)
    mislas = made("imagenet-lt-90", "methods/imagenet-lt/mislas_mixup")
    assert mislas.classifier.smoothing == [0.3, 0.0]
    assert (mislas.student.augment.mix, mislas.student.augment.mix_alpha) == ("mixup", 0.2)


def test_the_margins_of_ldam_are_in_units_of_the_logits_and_its_logits_count_as_balanced():
    student = params(yaml.safe_load(apply_recipe([METHODS / "ldam_drw.yaml"], ROOT / "params.yaml")[0])).student
    loss = class_loss(student, PRIOR)
    assert isinstance(loss, LDAMLoss) and loss.margins.tolist() == pytest.approx([7.424, 10.607, 15], abs=1e-3)
    assert student.assumed_adjustment is None and params().student.assumed_adjustment == 1.0
    lade = params({"student.loss": {"kind": "lade"}}).student
    assert isinstance(class_loss(lade, PRIOR), LADELoss) and lade.assumed_adjustment == 1.0

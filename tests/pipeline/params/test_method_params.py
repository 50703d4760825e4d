"""Sections that are chosen by `kind`: messages, refused combinations, and overlays that change the kind."""

from __future__ import annotations

import pytest
import yaml

from models.losses.class_loss import LADELoss, LDAMLoss
from pipeline.data.class_prior import Prior
from pipeline.params.recipe import apply_recipe
from pipeline.shared.errors import ParamsError
from pipeline.training.method_setup import class_loss
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


def test_the_margins_of_ldam_are_in_units_of_the_logits_and_its_logits_count_as_balanced():
    student = params(yaml.safe_load(apply_recipe([METHODS / "ldam_drw.yaml"], ROOT / "params.yaml")[0])).student
    loss = class_loss(student, PRIOR)
    assert isinstance(loss, LDAMLoss) and loss.margins.tolist() == pytest.approx([7.424, 10.607, 15], abs=1e-3)
    assert student.assumed_adjustment is None and params().student.assumed_adjustment == 1.0
    lade = params({"student.loss": {"kind": "lade"}}).student
    assert isinstance(class_loss(lade, PRIOR), LADELoss) and lade.assumed_adjustment == 1.0

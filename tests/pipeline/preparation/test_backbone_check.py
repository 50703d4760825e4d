"""A backbone that does not run at the image size, or cannot be exported, is rejected in one line before training."""

import pytest

from pipeline.shared.errors import ParamsError
from pipeline.training.run import check_backbones
from tests.support.making import params

pytestmark = pytest.mark.slow


def check(recipe) -> None:
    check_backbones(recipe.teacher.backbone, recipe.student.backbone, recipe.image.size, recipe.export.opset)


def test_a_backbone_that_does_not_run_at_the_image_size_is_refused_with_key_and_size():
    made = params({"teacher.backbone": "timm/crossvit_tiny_240", "image.size": 64, "image.resize_to": 64})
    with pytest.raises(
        ParamsError, match=r"teacher\.backbone is 'timm/crossvit_tiny_240'.* image\.size = 64: "
    ) as caught:
        check(made)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_student_backbone_that_does_not_export_is_refused_before_training():
    pytest.importorskip("onnxscript")
    made = params({"student.backbone": "timm/nest_tiny", "image.size": 64, "image.resize_to": 64})
    with pytest.raises(ParamsError, match=r"student\.backbone is 'timm/nest_tiny', which does not run or export"):
        check(made)


def test_the_check_does_not_import_a_users_module_named_like_one_of_tailors(tmp_path, monkeypatch):
    for name in ("models", "pipeline", "serving"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this is not Tailor')\n")
    monkeypatch.chdir(tmp_path)
    check(params({"student.backbone": "torchvision/resnet18"}))


def test_only_rank_0_checks_backbones_and_built_in_networks_are_not_checked(monkeypatch):
    monkeypatch.setenv("PATH", "")
    check(params())
    monkeypatch.setenv("RANK", "1")
    check(params({"teacher.backbone": "timm/none_such"}))

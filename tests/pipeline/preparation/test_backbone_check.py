"""A backbone that does not run at the image size, or cannot be exported, is rejected in one line before training."""

import pytest

from pipeline.shared.errors import ParamsError
from pipeline.training.run import check_backbones, check_tuned_export
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
    with pytest.raises(ParamsError, match=r"which does not run or export .* AssertionError: only 4D query") as caught:
        check(made)
    assert str(caught.value).startswith("student.backbone is 'timm/nest_tiny', ")


def tuned(name, size):
    """Return params of a student that tunes the encoder `name`."""
    return params(
        {
            "encoder": {"name": name}, "student.tune": "last_blocks", "image.size": size, "image.resize_to": size,
            **{f"{stage}.backbone": "encoder" for stage in ("teacher", "student")},
            **{f"teacher.augment.{key}": value for key, value in (("crop_padding", 0), ("flip", False), ("cutout", 0))},
        }
    )  # fmt: skip


def test_an_encoder_that_does_not_export_is_refused_only_where_the_student_tunes_it(monkeypatch):
    pytest.importorskip("onnxscript")
    made = tuned("timm/nest_tiny", 224)
    size, opset = made.image.size, made.export.opset
    check_tuned_export(made.encoder, made.student.model_copy(update={"tune": "none"}), size, opset)
    with pytest.raises(
        ParamsError, match=r"^encoder\.name is 'timm/nest_tiny', which does not run or export at image\.size = 224: "
    ):
        check_tuned_export(made.encoder, made.student, size, opset)
    monkeypatch.setenv("RANK", "1")
    check_tuned_export(made.encoder, made.student, size, opset)


def test_an_encoder_with_a_fixed_size_is_exported_at_another_size():
    made = tuned("timm/test_vit", 64)
    check_tuned_export(made.encoder, made.student, made.image.size, made.export.opset)


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

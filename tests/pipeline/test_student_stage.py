"""Stage `student` with its switches: terms on and off, teachers of any width or none, on small real files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pyarrow.parquet
import pytest
import torch

import pipeline.classifier
import pipeline.evaluate
import pipeline.prior
import pipeline.split
import pipeline.student
import pipeline.teacher
import pipeline.training.run
from models.objectives.teacher import TeacherObjective
from pipeline.data.dataset import load_images
from pipeline.model_io.checkpoint import load_model
from pipeline.shared.artifacts import CLASSIFIER, EVALUATION, STUDENT, TEACHER
from pipeline.shared.errors import ParamsError, StageError
from pipeline.training.run import model_config, stage_seed, train_network
from tests.support.making import data_params, folder, params

pytestmark = pytest.mark.slow

SHORT = {"epochs": 1, "batch_size": 8, "learning_rate": 0.01}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Params for a folder of 30 images in three classes; split and prior are finished, without a teacher."""
    monkeypatch.chdir(tmp_path)
    source = folder(tmp_path / "images", {"a": 18, "b": 12, "c": 9})

    def with_changes(**changes):
        base = data_params(source).model_dump(mode="json")["data"]
        keys = {f"data.{key}": value for key, value in base.items()}
        short = {f"{stage}.{key}": value for stage in ("teacher", "student") for key, value in SHORT.items()}
        chosen = {f"student.{key}": value for key, value in changes.items() if key != "teacher"}
        return params({**keys, **short, "student.queue_total": 24, **chosen, **changes.get("teacher", {})})

    pipeline.split.run(with_changes())
    pipeline.prior.run(with_changes())
    return with_changes


def last_record() -> dict[str, float]:
    return json.loads((STUDENT / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.parametrize("pretraining", ["none", "rotation"])
def test_too_little_memory_on_the_gpu_is_one_line_that_says_what_to_change(made, monkeypatch, pretraining):
    def full(*_):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7 GiB"
        )

    monkeypatch.setattr(pipeline.training.run.Training, "run", full)
    chosen = made(contrast_encoder="momentum", alpha=0.0, pretraining=pretraining)
    with pytest.raises(
        StageError, match=r"^CUDA out of memory\. Tried to allocate 2\.00 GiB; lower the stage's batch_size"
    ):
        pipeline.student.run(chosen)


def test_a_student_with_a_momentum_encoder_and_no_distillation_needs_no_teacher_at_all(made):
    pipeline.student.run(made(contrast_encoder="momentum", alpha=0.0))
    assert not TEACHER.exists()
    record = last_record()
    assert {"classification", "gml", "tau", "tau_g"} <= set(record) and "distillation" not in record
    assert (STUDENT / "model.safetensors").is_file()


@pytest.mark.parametrize("changes", [{"contrast_encoder": "momentum"}, {"alpha": 0.0}, {"beta": 0.0}, {}])
def test_a_teacher_that_some_term_needs_is_missed_by_name(made, changes):
    with pytest.raises(
        ParamsError, match=r"artifacts/teacher/config\.json: no such file; run `dvc repro teacher` first"
    ):
        pipeline.student.run(made(**changes))


def test_without_contrast_the_record_has_only_the_remaining_terms(made):
    pipeline.student.run(made(beta=0.0, alpha=0.0))
    record = last_record()
    assert record["classification"] == pytest.approx(record["loss"])
    assert not {"gml", "tau", "tau_g", "distillation", "queries_without_keys"} & set(record)


def test_a_teacher_of_another_library_and_width_teaches_a_small_student(made):
    chosen = made(teacher={"teacher.backbone": "torchvision/resnet18"})
    pipeline.teacher.run(chosen)
    pipeline.student.run(chosen)
    prior = pipeline.data.class_prior.load_prior()
    config = model_config(chosen.student, chosen.image, len(prior.classes))
    objective = pipeline.training.student_setup.build_objective(chosen.student, chosen.image, config, prior, 0, TEACHER)
    assert (objective.teacher.feature_dim, objective.model.feature_dim) == (512, 64)
    assert objective.queues.features.shape == (24, 512)
    assert last_record()["distillation"] > 0


@pytest.mark.parametrize(("weighting", "resumes"), [("frequency", True), ("effective_number", False)])
def test_an_interrupted_run_resumes_under_the_same_prior_alone(made, monkeypatch, capsys, weighting, resumes):
    recipe = made(teacher={"teacher.epochs": 2})

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline.training.run, "write_file", stop)  # called after the first epoch is saved
        pipeline.teacher.run(recipe)
    pipeline.prior.run(made(teacher={"prior.weighting": weighting, "prior.beta": 0.9}))
    pipeline.teacher.run(recipe)
    assert ("resumes at step" in capsys.readouterr().out) is resumes


def test_a_student_starts_with_weights_and_an_order_of_images_that_are_not_its_teachers(made):
    still = {"learning_rate": 1e-12, "epochs": 2}  # the saved weights are the initial ones
    recipe = made(
        **still, gamma=1.0, beta=0.0, alpha=0.0, teacher={f"teacher.{key}": value for key, value in still.items()}
    )
    pipeline.teacher.run(recipe)
    pipeline.student.run(recipe)
    taught, learnt = load_model(TEACHER, "teacher")[0], load_model(STUDENT, "student")[0]
    for one, other in zip(taught.parameters(), learnt.parameters(), strict=True):
        # Batch-norm weights start at 0 and 1.
        assert one.ndim == 1 or not torch.allclose(one, other, rtol=0, atol=1e-3)

    # The student starts with the teacher's weights, so only order and augmentation differ.
    losses = []
    for stage, section in (("teacher", recipe.teacher), ("student", recipe.student)):
        prior = pipeline.data.class_prior.load_prior()
        objective = TeacherObjective(copy.deepcopy(taught), torch.tensor(prior.in_losses))
        config, output = model_config(section, recipe.image, len(prior.classes)), Path(f"{stage}-again")
        train_network(stage, objective, config, recipe, prior, torch.device("cpu"), output, [])
        losses.append([json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] != losses[1]


def test_the_student_has_a_seed_derived_from_the_teachers():
    students = [stage_seed(seed, "student") for seed in (*range(100), 2**63 - 1)]
    assert [stage_seed(seed, "teacher") for seed in (0, 7)] == [0, 7]
    assert len({*students, *range(100)}) == 201 and all(0 <= seed < 2**63 for seed in students)
    assert stage_seed(0, "student") == students[0]


TERMS = {
    "supcon": "self", "bcl": "self", "proco": "self", "gpaco": "self", "paco": "momentum", "kcl": "momentum",
    "tsc": "momentum", "hybrid_sc": "self", "concutmix": "self",
}  # fmt: skip


@pytest.mark.parametrize("kind", TERMS)
def test_a_contrast_term_of_another_paper_needs_no_teacher(made, kind):
    contrast = {"kind": kind, **({"queue": 16} if kind in ("paco", "gpaco", "kcl", "tsc") else {})}
    alone = {"gamma": 0.0} if kind in ("paco", "gpaco") else {}
    balanced = {"adjustment": 0.0} if kind == "hybrid_sc" else {}
    pipeline.student.run(made(contrast=contrast, contrast_encoder=TERMS[kind], alpha=0.0, **alone, **balanced))
    record = last_record()
    assert record["contrast"] > 0 and ("classification" in record) is not bool(alone) and not TEACHER.exists()
    load_model(STUDENT, "student")


def test_crd_compares_with_the_teacher_and_takes_the_classes_of_the_training_images(made):
    recipe = made(contrast={"kind": "crd", "negatives": 16}, teacher={"teacher.backbone": "torchvision/resnet18"})
    pipeline.teacher.run(recipe)
    pipeline.student.run(recipe)
    assert {"contrast", "distillation", "classification"} <= set(last_record())
    prior = pipeline.data.class_prior.load_prior()
    config = model_config(recipe.student, recipe.image, len(prior.classes))
    term = pipeline.training.student_setup.build_objective(
        recipe.student, recipe.image, config, prior, 0, TEACHER
    ).term  # fmt: skip
    labels = load_images(recipe.data, recipe.image, "train").labels
    assert torch.equal(labels[term.order], labels.sort(stable=True).values)
    assert torch.equal(term.lengths, torch.bincount(labels)) and term.teacher_head.linear.in_features == 512


def test_an_encoder_trained_alone_gets_its_classifier_in_a_second_stage(made):
    recipe = made(
        contrast={"kind": "supcon"}, contrast_encoder="self", gamma=0.0, alpha=0.0,
        teacher={"classifier.kind": "crt", "classifier.epochs": 1},
    )  # fmt: skip
    pipeline.student.run(recipe)
    pipeline.classifier.run(recipe)
    assert "classification" not in last_record()
    assert load_model(CLASSIFIER, "classifier")[1].second_stage["kind"] == "crt"


def test_the_pretraining_by_rotations_gives_the_first_weights_and_is_not_repeated_on_resume(made, monkeypatch, capsys):
    recipe = made(beta=0.0, alpha=0.0, pretraining="rotation", epochs=2)
    left = STUDENT.with_name(".student.rotation.unfinished")
    started = []
    build = pipeline.student.build_objective

    def stop(*arguments):
        started.append({name: weight.clone() for name, weight in arguments[-1].items()})
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline.student, "build_objective", stop)
        pipeline.student.run(recipe)
    assert capsys.readouterr().out.count("epoch 2/2") == 1 and left.is_dir()

    def again(*arguments):
        assert all(torch.equal(weight, started[0][name]) for name, weight in arguments[-1].items())
        objective = build(*arguments)
        assert all(torch.equal(objective.model.backbone.state_dict()[name], w) for name, w in started[0].items())
        return objective

    monkeypatch.setattr(pipeline.student, "build_objective", again)
    pipeline.student.run(recipe)
    printed = capsys.readouterr().out
    assert printed.count("epoch 2/2") == 1 and "pretraining by rotations" in printed and not left.exists()
    epochs = [json.loads(line)["epoch"] for line in (STUDENT / "pretraining.jsonl").read_text().splitlines()]
    assert epochs == [1, 2]


@pytest.mark.parametrize("wanted", [True, False])
def test_the_report_of_a_cnn_draws_the_maps_of_its_mistakes_only_where_serving_wants_them(made, wanted):
    changed = made(teacher={"serving.explain.map": wanted})
    for stage in (pipeline.teacher, pipeline.student, pipeline.evaluate):
        stage.run(changed)
    table = pyarrow.parquet.read_table(EVALUATION / "predictions.parquet")
    wrong = sum(map(int.__ne__, table["label"].to_pylist(), table["predicted_balanced"].to_pylist()))
    assert wrong > 0
    page = (EVALUATION / "report.html").read_text(encoding="utf-8")
    assert page.count('alt="activation map of') == (min(wrong, 8) if wanted else 0)
    assert "most similar training images" not in page

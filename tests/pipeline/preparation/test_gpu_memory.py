"""The memory estimate of a step against the allocator's record of the real step, and estimates of large recipes."""

from __future__ import annotations

import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from pipeline.commands.app import main
from pipeline.preparation.gpu_memory import choose_prior, estimate_memory, new_objective, tuned_record
from pipeline.training.step import Step
from tests.support.making import ROOT, params
from tests.support.small_encoder import tiny_encoder, tiny_params
from tests.support.small_training import CPU, made_images

pytestmark = pytest.mark.slow

SMALL = {
    "image.size": 32, "image.resize_to": 32, "engine.precision": "float32",
    "teacher.backbone": "torchvision/resnet18", "student.backbone": "torchvision/resnet18",
    "teacher.batch_size": 16, "student.batch_size": 16, "student.queue_total": 4096, "student.projection_dim": 64,
}  # fmt: skip


def made(**changes):
    made = params({**SMALL, **changes})
    return made, choose_prior(made, 30, 3000)


def measure_allocated(given, prior, stage: str) -> int:
    """Return the peak bytes of the real step, from the allocations and frees of PyTorch's CPU allocator."""
    section = getattr(given, stage)
    encoder = tuned_record(given, stage)
    objective = new_objective(given, stage, prior, encoder).to(memory_format=torch.channels_last)
    recompute = given.engine.checkpoint_activations
    step = Step(objective, section, given.image, made_images(0), CPU, checkpoint_activations=recompute)
    state = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in state_tensors(step)}
    views = torch.zeros(objective.views, section.batch_size, 3, 32, 32, dtype=torch.uint8)
    target, chosen = torch.zeros(section.batch_size, dtype=torch.int64), torch.arange(section.batch_size)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step.descend(views, target, chosen, None)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    held = peak = 0
    for index, size in enumerate(sizes):
        held += size
        # Skip scratch memory that is freed next: without AVX-512, oneDNN takes 76 MB for a convolution; a GPU does not.
        if sizes[index + 1 : index + 2] != [-size]:
            peak = max(peak, held)
    return sum(state.values()) + peak + views.nbytes


def state_tensors(step: Step) -> list[torch.Tensor]:
    average = [] if step.average is None else list(step.average.state_dict().values())
    return [*step.objective.parameters(), *step.objective.buffers(), *step.optimiser.state(), *average]


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("teacher", {"teacher.ema_decay": 0.9}),
        ("student", {}),
        ("student", {"student.accumulate": 2, "engine.checkpoint_activations": True, "student.batch_size": 32}),
    ],
    ids=["teacher", "student", "in parts and recomputed"],
)
def test_the_estimate_is_within_a_tenth_of_the_real_step(stage, changes):
    given, prior = made(**changes)
    estimate = estimate_memory(given, stage, prior)
    assert estimate.peak == pytest.approx(measure_allocated(given, prior, stage), rel=0.1)
    assert estimate.peak == sum(estimate.at_peak.values())


@pytest.mark.parametrize("tune", ["last_blocks", "lora", "adaptformer", "all"])
def test_the_estimate_of_a_tuned_encoder_is_within_a_tenth_of_the_real_step(tmp_path, monkeypatch, tune):
    tuned = {"student.tune": tune, "student.batch_size": 64, "student.queue_total": 256, "engine.precision": "float32"}
    given = tiny_params(tiny_encoder(tmp_path, monkeypatch), tmp_path, tuned)
    prior = choose_prior(given, 30, 3000)
    estimate = estimate_memory(given, "student", prior)
    assert estimate.peak == pytest.approx(measure_allocated(given, prior, "student"), rel=0.1)


def test_every_kind_is_counted_at_its_size():
    given, prior = made()
    largest = estimate_memory(given, "student", prior).largest
    network = sum(p.nbytes for p in new_objective(given, "student", prior).model.backbone.parameters())
    assert largest["queue"] == pytest.approx(4096 * 512 * 4, rel=0.02)
    assert network < largest["gradients"] <= largest["weights"] and largest["optimiser"] == largest["gradients"]
    assert largest["activations: similarity"] >= 16 * 4096 * 4
    assert largest["activations: logits"] >= 16 * 30 * 4


def test_accumulation_checkpointing_and_bfloat16_reduce_activation_memory():
    activations = "activations: network"
    # Large, so that the bfloat16 copies of the weights are negligible; nothing is allocated.
    large = {"student.batch_size": 256}
    whole = estimate_memory(*student_arguments(made(**large))).largest[activations]
    for changes, most in (
        ({"student.accumulate": 4}, 0.35),
        ({"engine.checkpoint_activations": True}, 0.6),
        ({"engine.precision": "bfloat16"}, 0.75),
    ):
        assert estimate_memory(*student_arguments(made(**large, **changes))).largest[activations] < most * whole, (
            changes
        )


def student_arguments(given_and_prior):
    given, prior = given_and_prior
    return given, "student", prior


@pytest.mark.end_to_end
def test_a_queue_of_65536_rows_and_8142_classes_fits_80_gb(tmp_path, capsys, monkeypatch):
    from pipeline.params.recipe import apply_recipe

    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        f"extends: {ROOT / 'recipes/inaturalist2018-100.yaml'}\n"
        "student: {backbone: torchvision/resnext50_32x4d, batch_size: 256}\n"
    )
    recipe = tmp_path / "params.yaml"
    recipe.write_text(apply_recipe([overlay], ROOT / "params.yaml")[0])
    monkeypatch.chdir(tmp_path)
    assert main(["memory", "--params", str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert "torchvision/resnext50_32x4d, batch 256, 224 pixels" in printed and "fits a card of 80 GB" in printed


def test_a_step_that_does_not_fit_is_reported_with_remedies(capsys):
    assert main(["memory", "--params", str(ROOT / "params.yaml"), "--classes", "10", "--card", "0.01"]) == 1
    printed = capsys.readouterr().out
    assert "does not fit a card of 0.01 GB" in printed
    assert "to reduce memory: student.accumulate, engine.checkpoint_activations" in printed


@pytest.mark.parametrize(("stage", "tune"), [("teacher", "lora"), ("student", "none")])
def test_a_stage_on_stored_features_needs_no_estimate_and_one_that_tunes_the_encoder_gets_one(
    tmp_path, monkeypatch, capsys, stage, tune
):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "params.yaml"
    given = tiny_params(
        tiny_encoder(tmp_path, monkeypatch), tmp_path, {"student.tune": tune, "student.queue_total": 64}
    )
    recipe.write_text(yaml.safe_dump(given.model_dump(mode="json")))
    assert main(["memory", "--params", str(recipe), "--stage", stage]) == 2
    reason = f"encoder is tiny: {stage} trains on stored features, not on images, and needs no estimate"
    assert reason in " ".join(capsys.readouterr().err.split())
    if tune == "lora":
        assert main(["memory", "--params", str(recipe), "--classes", "10"]) == 0
        assert "student: tiny, tune lora, batch 8, 32 pixels" in capsys.readouterr().out


def test_originals_of_resized_crops_count_as_host_memory_at_their_upper_bound(tmp_path, capsys):
    given, prior = made(**{"teacher.augment.crop": "resized"})
    padded, resized = estimate_memory(given, "student", prior), estimate_memory(given, "teacher", prior)
    assert (padded.originals, padded.images) == (False, 3000 * 3 * 32 * 32)
    # A crop of 8 % of the area and ratio 3/4 or 4/3 has 32 pixels per side.
    assert resized.originals and resized.images == pytest.approx(3000 * 3 * 32 * 32 * (4 / 3) / 0.08, rel=1e-3)
    recipe = tmp_path / "params.yaml"
    recipe.write_text((ROOT / "params.yaml").read_text().replace("crop: pad", "crop: resized"))
    main(["memory", "--params", str(recipe), "--classes", "10", "--images", "1000"])
    assert "originals for resized crops take at most" in " ".join(capsys.readouterr().out.split())


def test_without_a_split_the_number_of_classes_is_required(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["memory", "--params", str(ROOT / "params.yaml")]) == 2
    assert "artifacts/prior.json: no such file, so --classes is needed" in capsys.readouterr().err
    assert main(["memory", "--params", str(ROOT / "params.yaml"), "--classes", "10", "--images", "9"]) == 2
    assert "--images is 9, below the 10 classes" in capsys.readouterr().err


def test_a_number_of_images_is_refused_if_the_split_has_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/prior.json").write_text("{}")
    assert main(["memory", "--params", str(ROOT / "params.yaml"), "--images", "500"]) == 2
    printed = capsys.readouterr().err
    assert "--images is 500, but artifacts/prior.json has the number of images already; give --classes too" in printed


def test_published_data_sets_are_counted_without_their_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prior = choose_prior(params({"data.source": "inaturalist2018"}), None, None)
    assert len(prior.counts) == 8142 and sum(prior.counts) == 437_513 and max(prior.counts) == 1000

"""The files of recipes/ against the paper's tables, which are copied here.

Columns: dataset, imbalance factor, epochs, batch size, learning rate, weight decay, milestones or cosine, warm-up
epochs; tau_g and whether it is trained, K, k_m, gamma, beta, alpha, backbone, classifier view, query and key view,
projection.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import yaml

from models.contrast.queues import queue_lengths
from models.networks.backbones import check_backbone
from models.networks.encoders import find_encoder
from pipeline.data.profiles import class_sizes
from pipeline.model_io.encoder import describe
from pipeline.params import Params, parse_params
from pipeline.params.recipe import apply_recipe
from tests.support.making import ROOT

RECIPES = ROOT / "recipes"
VARIANTS = sorted(path.stem for path in (RECIPES / "variants").glob("*.yaml"))

TRAINING = """
    cifar10-if10-200     cifar10          10  200   64  0.05  5e-4  160,180   5
    cifar10-if50-200     cifar10          50  200   64  0.05  5e-4  160,180   5
    cifar10-if100-200    cifar10         100  200   64  0.05  5e-4  160,180   5
    cifar10-if10-400     cifar10          10  400   64  0.05  5e-4  320,360  10
    cifar10-if50-400     cifar10          50  400   64  0.05  5e-4  320,360  10
    cifar10-if100-400    cifar10         100  400   64  0.05  5e-4  320,360  10
    cifar100-if10-200    cifar100         10  200   64  0.05  5e-4  160,180   5
    cifar100-if50-200    cifar100         50  200   64  0.05  5e-4  160,180   5
    cifar100-if100-200   cifar100        100  200   64  0.05  5e-4  160,180   5
    cifar100-if10-400    cifar100         10  400   64  0.05  5e-4  320,360  10
    cifar100-if50-400    cifar100         50  400   64  0.05  5e-4  320,360  10
    cifar100-if100-400   cifar100        100  400   64  0.05  5e-4  320,360  10
    imagenet-lt-90       imagenet_lt     256   90  128  0.05  5e-4  cosine    0
    imagenet-lt-400      imagenet_lt     256  400  128  0.05  5e-4  cosine    0
    inaturalist2018-100  inaturalist2018 500  100  128  0.02  2e-4  cosine    0
    inaturalist2018-400  inaturalist2018 500  400  128  0.02  2e-4  cosine    0
"""
METHOD = """
    cifar10-if10-200     0.1   fixed     4096  2  1    1  1  resnet32         autoaugment  autoaugment   32
    cifar10-if50-200     0.1   fixed     4096  2  1    1  1  resnet32         autoaugment  autoaugment   32
    cifar10-if100-200    0.1   fixed     4096  2  1    1  1  resnet32         autoaugment  autoaugment   32
    cifar10-if10-400     0.1   fixed     4096  2  1    1  1  resnet32         autoaugment  autoaugment   32
    cifar10-if50-400     0.1   fixed     4096  2  1    1  1  resnet32         autoaugment  autoaugment   32
    cifar10-if100-400    0.1   fixed     4096  2  1    1  1  resnet32         autoaugment  autoaugment   32
    cifar100-if10-200    0.1   fixed     4096  2  1    1  1  resnet32         autoaugment  autoaugment   32
    cifar100-if50-200    0.1   fixed     4096  2  1    1  1  resnet32         autoaugment  autoaugment   32
    cifar100-if100-200   0.1   fixed     4096  2  1    1  1  resnet32         autoaugment  autoaugment   32
    cifar100-if10-400    0.1   fixed     4096  2  1    1  1  resnet32         autoaugment  autoaugment   32
    cifar100-if50-400    0.1   fixed     4096  2  1    1  1  resnet32         autoaugment  autoaugment   32
    cifar100-if100-400   0.1   fixed     4096  2  1    1  1  resnet32         autoaugment  autoaugment   32
    imagenet-lt-90       0.07  trained  16384  2  1    1  0  resnext50_32x4d  randaugment  simaugment  1024
    imagenet-lt-400      0.07  trained  16384  2  0.5  2  0  resnext50_32x4d  randaugment  simaugment  1024
    inaturalist2018-100  0.1   fixed    65536  2  1    1  0  resnet50         simaugment   simaugment  1024
    inaturalist2018-400  0.1   fixed    65536  2  1    1  0  resnet50         simaugment   simaugment  1024
"""
# Teacher: epochs, batch size, learning rate, weight decay, milestones or cosine, warm-up, backbone, view.
TEACHER = """
    cifar            200  128  0.1   5e-4  160,180  5  resnet56          autoaugment
    imagenet-lt       90  128  0.05  5e-4  cosine   0  resnext101_32x8d  randaugment
    inaturalist2018  100  128  0.02  2e-4  cosine   0  resnet152         simaugment
"""
# Number of classes, largest and smallest class, images of the training split (CIFAR-LT: counted by its rule).
SIZES = {
    "cifar10-if10": (10, 5000, 500, 20431),
    "cifar10-if50": (10, 5000, 100, 13996),
    "cifar10-if100": (10, 5000, 50, 12406),
    "cifar100-if10": (100, 500, 50, 19573),
    "cifar100-if50": (100, 500, 10, 12608),
    "cifar100-if100": (100, 500, 5, 10847),
}
# Recipes of Table 4: epochs, batch size, tuning rate of the encoder (VL-LTR's stage 1), image side, width of the joint space.
CLIP = {
    "imagenet-lt-clip-rn50": (50, 2048, 5e-5, 224, 1024),
    "imagenet-lt-clip-vit-b16": (50, 1024, 3.5e-5, 224, 512),
    "inaturalist2018-clip-rn50": (100, 2048, 5e-5, 224, 1024),
    "inaturalist2018-clip-vit-b16": (100, 1024, 3.5e-4, 384, 512),
}
CLASSES = {"imagenet-lt": 1000, "inaturalist2018": 8142}
IMAGES = {
    "cifar": (32, 32, [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    "imagenet-lt": (224, 256, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "inaturalist2018": (224, 256, [0.466, 0.471, 0.380], [0.195, 0.194, 0.192]),
}


def rows(table: str) -> dict[str, list[str]]:
    return {cells[0]: cells[1:] for cells in (line.split() for line in table.split("\n")) if cells}


TRAINING_ROWS, METHOD_ROWS, TEACHER_ROWS = rows(TRAINING), rows(METHOD), rows(TEACHER)


@functools.cache
def applied(*names: str, target: Path = ROOT / "params.yaml") -> Params:
    text, _ = apply_recipe([RECIPES / f"{name}.yaml" for name in names], target)
    return parse_params(yaml.safe_load(text), target)


def family(name: str) -> str:
    return "cifar" if name.startswith("cifar") else name.rpartition("-")[0]


def schedule_of(section) -> str:
    schedule = section.schedule
    return "cosine" if schedule.kind == "cosine" else ",".join(map(str, schedule.milestones))


def optimisation_of(section) -> list[str | float]:
    """Return the cells of a table: epochs, batch size, learning rate, weight decay, schedule, warm-up."""
    numbers = [section.epochs, section.batch_size, section.learning_rate, section.weight_decay]
    return [*numbers, schedule_of(section), section.schedule.warmup_epochs]


def cells(row: list[str]) -> list[str | float]:
    """Convert number cells to numbers; leave the others unchanged."""
    return [float(cell) if cell.replace(".", "").replace("e-", "").isdigit() else cell for cell in row]


def flat(model: dict, prefix: str = "") -> dict[str, object]:
    """Flatten a nested mapping to dotted keys."""
    made: dict[str, object] = {}
    for key, value in model.items():
        made |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return made


def test_the_tables_hold_every_recipe_of_the_folder():
    own = {
        "ade20k-fcn-r50",
        "camvid-cpu",
        "cifar10-1000-if100",
        "cifar10-parquet-if100",
        "cifar10-parquet-if100-one-epoch",
        "cifar10-parquet-if100-cpu",
        *CLIP,
        "photographs-lite0",
        "tiny-imagenet-lt",
        "tiny-imagenet-lt-cpu",
    }
    assert {path.stem for path in RECIPES.glob("*.yaml")} == {*TRAINING_ROWS, *own}
    assert set(TRAINING_ROWS) == set(METHOD_ROWS) and len(TRAINING_ROWS) == 16


@pytest.mark.parametrize("name", TRAINING_ROWS)
def test_a_recipe_alone_gives_its_row_of_the_paper(name):
    made = applied(name)
    data, student, teacher = made.data, made.student, made.teacher
    assert [data.source, data.imbalance_factor, *optimisation_of(student)] == cells(TRAINING_ROWS[name])

    contrast = student.augment.contrast_policy
    assert [
        student.tau_g,
        "trained" if student.train_tau_g else "fixed",
        *(student.queue_total, student.queue_minimum, student.gamma, student.beta, student.alpha),
        student.backbone.removeprefix("torchvision/"),
        student.augment.policy,
        student.augment.policy if contrast == "same" else contrast,
        student.projection_dim,
    ] == cells(METHOD_ROWS[name])

    backbone = teacher.backbone.removeprefix("torchvision/")
    assert [*optimisation_of(teacher), backbone, teacher.augment.policy] == cells(TEACHER_ROWS[family(name)])


@pytest.mark.parametrize("name", TRAINING_ROWS)
def test_all_rows_share_these_params(name):
    made = applied(name)
    student, teacher = made.student, made.teacher
    cifar = family(name) == "cifar"
    for section in (teacher, student):
        check_backbone(section.backbone)
        assert section.tau_s == pytest.approx(1 / 30) and section.momentum == 0.9
        assert section.schedule.rule == "paper" and section.schedule.factor == 0.1
        augment = section.augment
        assert augment.flip and augment.mix == "none"
        assert (section.adjustment, section.ema_decay) == (1.0, 0.0)
        assert (augment.crop, augment.crop_padding, augment.cutout) == (("pad", 4, 16) if cifar else ("resized", 0, 0))
        if not cifar:
            assert (augment.crop_scale, augment.jitter) == ([0.08, 1.0], 0.4)
    assert (student.prior_strength, student.distillation_temperature, made.prior.smoothing) == (1.0, 4.0, 0.0)
    assert student.contrast_encoder == "teacher"
    image = made.image
    assert (image.size, image.resize_to, image.mean, image.std) == IMAGES[family(name)]
    # No image of the published training split is held out, and nothing is downloaded without a request.
    assert (made.data.validation_per_class, made.data.download) == (0, False)
    assert made.data.profile == ("exponential" if cifar else "natural")


@pytest.mark.parametrize("name", TRAINING_ROWS)
def test_the_queues_of_a_row_hold_its_classes(name):
    made = applied(name)
    student, split = made.student, name.rpartition("-")[0]
    if split in SIZES:
        classes, largest, smallest, total = SIZES[split]
        counts = class_sizes(made.data.profile, [largest] * classes, made.data.imbalance_factor)
        assert (counts[0], counts[-1], sum(counts)) == (largest, smallest, total)
        lengths = queue_lengths(counts, student.queue_total, student.queue_minimum)
        assert sum(lengths) == 4096 and min(lengths) >= 3
    else:
        assert student.queue_total >= student.queue_minimum * CLASSES[split]


@pytest.mark.parametrize("earlier", ["imagenet-lt-400", "inaturalist2018-100", "cifar100-if100-400"])
@pytest.mark.parametrize("name", ["cifar10-if50-200", "imagenet-lt-90", "inaturalist2018-400"])
def test_a_recipe_replaces_every_value_of_an_earlier_recipe(name, earlier, tmp_path):
    target = tmp_path / "params.yaml"
    target.write_text((ROOT / "params.yaml").read_text())
    variants = [f"variants/{variant}" for variant in ("official-code-cifar", "without-teacher", "k-m-3", "plus")]
    text, _ = apply_recipe([RECIPES / f"{overlay}.yaml" for overlay in (earlier, *variants)], target)
    target.write_text(text)
    expected, actual = (flat(applied(name, target=path).model_dump()) for path in (ROOT / "params.yaml", target))
    assert actual == expected


BICUBIC = {"student.augment.bicubic": True, "teacher.augment.bicubic": True}
CHANGES = {
    "batch-64": ("cifar100-if100-200", {}),
    "batch-128": ("cifar100-if100-200", {"student.batch_size": 128, "student.learning_rate": 0.1}),
    "schedule-official": (
        "cifar100-if100-200",
        {"student.schedule.rule": "official", "teacher.schedule.rule": "official"},
    ),
    "schedule-paper": ("cifar100-if100-200", {}),
    "k-m-2": ("imagenet-lt-90", {}),
    "k-m-3": ("imagenet-lt-90", {"student.queue_minimum": 3}),
    "contrast-simaugment": ("imagenet-lt-90", {}),
    "contrast-stacked": ("imagenet-lt-90", {"student.augment.contrast_policy": "stacked"}),
    "tau-g-fixed": ("imagenet-lt-90", {"student.train_tau_g": False}),
    "tau-g-trained": ("cifar100-if100-200", {"student.train_tau_g": True}),
    "official-code-cifar": (
        "cifar100-if50-400",
        {
            "student.batch_size": 128,
            "student.learning_rate": 0.1,
            "student.schedule.rule": "official",
            "teacher.schedule.rule": "official",
            "student.train_tau_g": True,
            **BICUBIC,
        },
    ),
    "official-code-imagenet-lt": (
        "imagenet-lt-90",
        {"student.queue_minimum": 3, "student.augment.contrast_policy": "stacked", **BICUBIC},
    ),
    "bicubic": ("cifar100-if100-200", BICUBIC),
    "without-contrast": ("imagenet-lt-90", {"student.beta": 0.0}),
    "without-teacher": ("cifar100-if100-200", {"student.contrast_encoder": "momentum", "student.alpha": 0.0}),
    "without-distillation": ("cifar100-if100-200", {"student.alpha": 0.0}),
    **{
        name: (
            "cifar100-if100-200",
            {
                "student.ema_decay": decay,
                "student.augment.mix": "cutmix",
                "student.augment.contrast_policy": "simaugment",
            },
        )
        for name, decay in (("plus", 0.999), ("plus-short", 0.99))
    },
    # The other recipes have no section text; the pairs below check what text-centres changes.
    "text-centres": ("imagenet-lt-clip-rn50", {}),
    "text-and-image-centres": ("imagenet-lt-clip-rn50", {"student.contrast_encoder": "teacher_and_text"}),
    "text-centres-raw": ("imagenet-lt-clip-rn50", {"student.contrast.centres": "raw"}),
    "square-root-sampling": ("imagenet-lt-90", {"student.sampling": 0.5}),
    "teacher-resnet34": (
        "imagenet-lt-90",
        {"teacher.backbone": "torchvision/resnet34", "student.train_tau_g": False},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_changes_only_the_keys_of_its_name(variant):
    base, changes = CHANGES[variant]
    before = flat(applied(base).model_dump())
    after = flat(applied(base, f"variants/{variant}").model_dump())
    assert {key: value for key, value in after.items() if before[key] != value} == changes
    if after["teacher.backbone"] != "encoder":
        check_backbone(after["teacher.backbone"])


@pytest.mark.parametrize("name", CLIP)
def test_the_clip_recipes_tune_the_encoder_as_vl_ltr_against_text_centres(name):
    epochs, batch, rate, size, width = CLIP[name]
    params = applied(name)
    student, known = params.student, find_encoder("clip_b16")
    assert (student.epochs, student.batch_size, params.image.size) == (epochs, batch, size)
    assert student.learning_rate * student.tune_rate == pytest.approx(rate)
    assert (student.optimizer, student.weight_decay, student.sampling, student.tune) == ("adamw", 0.05, 0.5, "all")
    assert student.uses_text and student.contrast_encoder == "text" and not student.alpha
    assert (tuple(params.image.mean), tuple(params.image.std)) == (known.mean, known.std)
    described = describe(params.encoder)
    assert described.width == width and described.interpolation == params.image.interpolation == "bicubic"


def test_each_pair_of_variants_reverses_each_other():
    assert set(CHANGES) == set(VARIANTS)
    pairs = [("batch-128", "batch-64"), ("schedule-official", "schedule-paper"), ("k-m-3", "k-m-2"),
             ("contrast-stacked", "contrast-simaugment"), ("text-and-image-centres", "text-centres")]  # fmt: skip
    for there, back in pairs:
        base = CHANGES[there][0]
        assert applied(base, f"variants/{there}", f"variants/{back}") == applied(base)
    fixed = applied("imagenet-lt-90", "variants/tau-g-fixed")
    assert applied("imagenet-lt-90", "variants/tau-g-fixed", "variants/tau-g-trained") == applied("imagenet-lt-90")
    assert not fixed.student.train_tau_g


def test_the_photograph_pack_keeps_its_recipe_and_its_check_of_one_epoch():
    whole, check = applied("cifar10-parquet-if100"), applied("cifar10-parquet-if100-one-epoch")
    assert whole.data.source == check.data.source == "table" and whole.data.table.id == "name"
    assert (whole.data.validation_per_class, whole.data.validation_share, whole.data.imbalance_factor) == (
        100,
        0.02,
        100,
    )
    assert optimisation_of(whole.student) == optimisation_of(whole.teacher) == [200, 128, 0.1, 5e-4, "160,180", 5]
    assert whole.student.train_tau_g and whole.export.max_batch_size == 64
    assert optimisation_of(check.student) == optimisation_of(check.teacher) == [1, 128, 0.05, 5e-4, "cosine", 0]
    assert check.student.backbone == check.teacher.backbone == "resnet20" and check.student.queue_total == 512

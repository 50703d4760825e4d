"""params.yaml: accepted values, and errors that name the file, the key, the value and the allowed values."""

import math
import re

import pytest
import yaml
from pydantic import BaseModel

from pipeline.params import Params, load_params, parse_params
from pipeline.shared.errors import ParamsError
from tests.support.making import ROOT, content, params


def refusal(tmp_path, text):
    path = tmp_path / "params.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ParamsError) as caught:
        load_params(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert caught.value.exit_code == 2
    return message.removeprefix(f"{path}: ")


def refusal_of(tmp_path, changes):
    return refusal(tmp_path, yaml.safe_dump(content(changes)))


def test_the_shipped_file_loads_and_is_frozen():
    loaded = load_params(ROOT / "params.yaml")
    assert loaded.student.tau_s == pytest.approx(1 / 30)
    with pytest.raises(ValueError, match="frozen"):
        loaded.student.epochs = 3


TOO_LOW = {
    "seed": -1, "data.imbalance_factor": 0.99, "data.seed": -1, "data.test_per_class": 0, "data.validation_per_class": -1,
    "data.validation_share": -0.01, "image.size": 7, "image.resize_to": 7, "prior.smoothing": -0.1, "prior.beta": 0.0,
    "engine.checkpoint_seconds": -1, "teacher.adjustment": -0.1, "student.adjustment": -0.1,
    "teacher.ema_decay": -0.1, "student.ema_decay": -0.1,
    **{f"gate.{name}.margin": -0.1 for name in ("all", "many", "medium", "few", "ece", "nll", "coverage")},
    "serving.coverage": 0.0, "serving.ask": -0.1, "serving.false_alarms": 0.0,
    "gate.confidence": 0.5, "gate.resamples": 99, "gate.seed": -1, "gate.floor": -0.1,
    "stream.prefetch": 0, "stream.shuffle_mib": 0, "ingest.settle_seconds": -1, "ingest.min_good_share": -0.01,
    "ingest.max_table_mib": 0, "data.table.max_mib": 0,
    "retrain.keep": 1, "retrain.retries": -1, "retrain.retry_seconds": -1, "retrain.load_seconds": 0.0,
    "retrain.stage_hours": 0.0, "retrain.watch_seconds": -1,
    "teacher.tau_s": 0.0, "teacher.epochs": 0, "teacher.batch_size": 1, "teacher.learning_rate": 0.0,
    "teacher.accumulate": 0, "student.accumulate": 0, "teacher.adapter": -1, "student.adapter": -1,
    "teacher.gradient_clip": -0.1, "student.gradient_clip": -0.1,
    "teacher.momentum": -0.1, "teacher.weight_decay": -0.1, "teacher.schedule.warmup_epochs": -1,
    "teacher.schedule.factor": 0.0, "teacher.schedule.minimum": -0.1, "teacher.schedule.power": 0.0,
    "student.schedule.minimum": -0.1, "student.schedule.power": 0.0,
    "teacher.augment.crop_padding": -1, "teacher.augment.cutout": -1,
    "teacher.augment.jitter": -0.1, "teacher.augment.mix_alpha": 0.0,
    "student.tau_s": 0.0, "student.epochs": 0, "student.batch_size": 1, "student.learning_rate": 0.0,
    "student.momentum": -0.1, "student.weight_decay": -0.1, "student.schedule.warmup_epochs": -1,
    "student.schedule.factor": 0.0, "student.augment.crop_padding": -1, "student.augment.cutout": -1,
    "student.augment.jitter": -0.1, "student.augment.mix_alpha": 0.0,
    "student.gamma": -0.1, "student.beta": -0.1, "student.alpha": -0.1, "student.distillation_temperature": 0.0,
    "classifier.views": -1, "student.sampling": -0.1,
    "student.tune_blocks": 0, "student.tune_rank": 0, "student.tune_rate": 0.0, "student.tune_decay": 0.0,
    "student.encoder_momentum": -0.1, "student.prior_strength": -0.1, "student.tau_g": 0.0, "student.queue_total": 0,
    "student.queue_minimum": 0, "student.projection_dim": 0, "evaluate.ece_bins": 1, "evaluate.top_k": 0,
    "evaluate.samples": 0,
    "export.opset": 17, "export.max_batch_size": 1, "export.tolerance": 0.0, "export.golden": 0, "serving.top_k": 0,
    "serving.image_pixels": 0, "serving.request_pixels": 0, "serving.explain.images": -1,
    "export.half.tolerance": 0.0, "export.half.agreement": -0.01,
}  # fmt: skip
TOO_HIGH = {
    "seed": 2**63, "data.seed": 2**32, "data.validation_share": 1.01, "prior.beta": 1.0,
    "image.size": 1025, "image.resize_to": 2049,
    "teacher.ema_decay": 1.0, "student.ema_decay": 1.0,
    "teacher.momentum": 1.0, "teacher.schedule.factor": 1.0, "student.momentum": 1.0, "student.schedule.factor": 1.0,
    "student.tune_decay": 1.01, "student.sampling": 1.01,
    "student.encoder_momentum": 1.0, "evaluate.ece_bins": 1001, "export.opset": 21, "export.max_batch_size": 1025,
    "ingest.min_good_share": 1.01, "stream.prefetch": 65,
    "serving.explain.images": 1_000_001,
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [*TOO_LOW.items(), *TOO_HIGH.items()])
def test_a_number_out_of_range_is_rejected_with_its_key_value_and_bound(tmp_path, key, value):
    assert re.search(
        rf"{re.escape(key)} is {re.escape(repr(value))}; input should be (greater|less) than",
        refusal_of(tmp_path, {key: value}),
    )


@pytest.mark.parametrize(("written", "read"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("'on'", "on")])
def test_a_bare_on_or_off_is_read_as_text(tmp_path, written, read):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text().replace("mode: auto", f"mode: {written}"))
    assert load_params(path).stream.mode == read


def numeric_keys(model, prefix=""):
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from numeric_keys(field.annotation, f"{prefix}{name}.")
        elif field.annotation in (int, float):
            yield prefix + name


def test_the_examples_above_cover_the_bound_of_every_number():
    # serving.strength is any finite number.
    assert set(numeric_keys(Params)) - set(TOO_LOW) == {"serving.strength"}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "key", ["data.imbalance_factor", "data.validation_share", "prior.smoothing", "student.tau_g", "student.momentum",
            "student.schedule.factor", "serving.strength"],
)  # fmt: skip
def test_a_number_that_is_not_finite_is_rejected(tmp_path, key, value):
    assert refusal_of(tmp_path, {key: value}).startswith(f"{key} is {value!r}; input should be")


@pytest.mark.parametrize(
    ("key", "value", "error_text"),
    [
        ("data.source", "folders", "data.source is 'folders'; input should be 'digits', 'folder', 'table', 'cifar10'"),
        ("data.profile", "linear", "data.profile is 'linear'; input should be 'natural', 'exponential', 'pareto' or 'step'"),
        ("device", "gpu", "device is 'gpu'; string should match pattern"),
        ("student.epochs", 2.5, "student.epochs is 2.5; input should be a valid integer"),
        ("student.epochs", "two", "student.epochs is 'two'; input should be a valid integer"),
        ("student.epochs", True, "student.epochs is True; input should be a valid integer"),
        ("student.learning_rate", "fast", "student.learning_rate is 'fast'; input should be a valid number"),
        ("student.learning_rate", True, "student.learning_rate is True; input should be a valid number"),
        ("student.train_tau_g", "yes", "student.train_tau_g is 'yes'; input should be a valid boolean"),
        ("student.backbone", 20, "student.backbone is 20; input should be a valid string"),
        ("student", None, "student is None; input should be"),
        ("image.mean", [0.5, 0.5], "image.mean is [0.5, 0.5]; list should have at least 3 items"),
        ("image.mean", [0.5, 0.5, 1.5], "image.mean.2 is 1.5; input should be less than or equal to 1"),
        ("image.std", [0.5, 0.0, 0.5], "image.std.1 is 0.0; input should be greater than 0"),
        ("image.std", [0.5] * 4, "image.std is [0.5, 0.5, 0.5, 0.5]; list should have at most 3 items"),
        ("image", {**content()["image"], "size": 32, "resize_to": 16}, "image: resize_to is 16, below size 32"),
        ("teacher.schedule", {"kind": "steps", "warmup_epochs": 0, "milestones": [20, 10]},
         "teacher.schedule: milestones is [20, 10]; expected epochs in rising order"),
        ("teacher.schedule", {"kind": "cosine", "warmup_epochs": 0, "rule": "code"},
         "teacher.schedule.rule is 'code'; input should be 'paper' or 'official'"),
        ("student.contrast_encoder", "student",
         "student.contrast_encoder is 'student'; input should be 'teacher', 'momentum', 'self', 'text' or 'teacher_and_text'"),
        ("student", {**content()["student"], "gamma": 0, "alpha": 0.0},
         "student.gamma and student.alpha are both 0, so no term trains the classifier; set one of them above 0, or"),
        ("teacher.schedule", {"kind": "steps", "warmup_epochs": 0, "milestones": [0]}, "teacher.schedule.milestones.0 is 0;"),
        ("teacher.schedule", {"kind": "cosine", "warmup_epochs": 0, "milestones": [10]},
         "teacher.schedule: milestones is set but kind is cosine"),
        ("data.table", {"image": "image", "path": "path"}, "data.table: set exactly one of image"),
        ("data.table", {"image": None}, "data.table: set exactly one of image"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_rejected_with_what_is_allowed(tmp_path, key, value, error_text):
    assert refusal_of(tmp_path, {key: value}).startswith(error_text)


@pytest.mark.parametrize(
    ("key", "error_text"),
    [
        ("studnt", "studnt is not a key; did you mean student?"),
        ("student.tau_gg", "student.tau_gg is not a key; did you mean student.tau_g?"),
        ("data.imbalance", "data.imbalance is not a key; did you mean data.imbalance_factor?"),
        (
            "teacher.schedule.warmup",
            "teacher.schedule.warmup is not a key; did you mean teacher.schedule.warmup_epochs?",
        ),
        ("data.table.classnames", "data.table.classnames is not a key; did you mean data.table.class_names?"),
        ("prior.xyz", "prior.xyz is not a key; allowed: beta, smoothing, weighting"),
    ],
)
def test_an_unknown_key_is_rejected_with_the_nearest_one_of_its_section(tmp_path, key, error_text):
    assert refusal_of(tmp_path, {key: 1}) == error_text


def test_a_missing_key_is_named():
    made = content()
    del made["student"]["tau_g"]
    with pytest.raises(ParamsError, match=r"student\.tau_g is missing"):
        parse_params(made, "params.yaml")


def test_a_misspelt_key_comes_before_the_keys_that_it_leaves_missing(tmp_path):
    made = content()
    made["student"] = {f"{key}_": value for key, value in made["student"].items()}
    assert refusal(tmp_path, yaml.safe_dump(made)).startswith(
        "student.accumulate_ is not a key; did you mean student.accumulate?"
    )


def test_several_errors_are_on_one_line(tmp_path):
    message = refusal_of(tmp_path, {"seed": -1, "student.epochs": 0})
    assert "seed is -1" in message and "student.epochs is 0" in message


@pytest.mark.parametrize(
    ("text", "number"),
    [("1e-4", 1e-4), ("5E-3", 5e-3), ("1.5e-3", 1.5e-3), ("2.e-3", 2e-3), ("1e+0", 1.0), ("+1e-2", 1e-2)],
)
def test_a_number_in_exponent_form_is_a_number(tmp_path, text, number):
    # YAML 1.1 parses most of these as text.
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text().replace("weight_decay: 0.0005", f"weight_decay: {text}"))
    assert load_params(path).student.weight_decay == number


def test_exponent_form_may_be_negative_and_text_stays_text():
    assert params({"serving.strength": "-1e-1"}).serving.strength == -0.1
    made = params({"data.location": "1e3", "data.table": {"class_names": ["1e5", "2e5"]}})
    assert made.data.location == "1e3" and made.data.table.class_names == ["1e5", "2e5"]


@pytest.mark.parametrize("text", ["1e", "e4", "1e-4x", "1_0e-4"])
def test_text_similar_to_exponent_form_is_rejected(tmp_path, text):
    assert refusal_of(tmp_path, {"student.learning_rate": text}).startswith(
        f"student.learning_rate is {text!r}; input should"
    )


def test_an_integer_is_accepted_for_a_float():
    assert params({"student.gamma": 1, "data.imbalance_factor": 100}).data.imbalance_factor == 100.0


@pytest.mark.parametrize(
    ("text", "error_text"),
    [
        ("", "holds NoneType; expected sections"),
        ("- a\n- b\n", "holds list; expected sections"),
        ("data: [unclosed\n", "not readable as YAML"),
        ("data: {a: 1}\n\ttabs: 2\n", "not readable as YAML"),
        ("1: 2\n", "1 is 1; keys should be strings"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_rejected(tmp_path, text, error_text):
    assert error_text in refusal(tmp_path, text)


def test_a_missing_or_binary_file_is_rejected(tmp_path):
    with pytest.raises(ParamsError, match=r"nowhere.yaml: No such file or directory; run from the project's root"):
        load_params(tmp_path / "nowhere.yaml")
    with pytest.raises(ParamsError, match="Is a directory"):
        load_params(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00data: 1")
    with pytest.raises(ParamsError, match=r"binary.yaml: not readable as YAML"):
        load_params(tmp_path / "binary.yaml")


def test_a_duplicate_key_is_rejected_with_its_line(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text() + "\nseed: 1\n")
    with pytest.raises(ParamsError, match=r"duplicate key 'seed' .*line \d+"):
        load_params(path)


@pytest.mark.parametrize(
    ("costs", "message"),
    [
        ("{a: -1}", "serving.costs.a is -1; input should be greater than or equal to 0"),
        ("[[0, .inf], [1, 0]]", "serving.costs.0.1 is inf; input should be a finite number"),
        ("[1, 2]", "serving.costs.0 is 1; input should be a valid list"),
        ("cheap", "serving.costs is 'cheap'; expected costs by class name, or a list of rows"),
    ],
)
def test_wrong_costs_are_named_by_their_key_alone(tmp_path, costs, message):
    refused = refusal_of(tmp_path, {"serving.costs": yaml.safe_load(costs)})
    assert refused.startswith(message) and "function" not in refused


def test_maps_with_a_float16_graph_are_rejected_before_any_stage_runs():
    with pytest.raises(
        ParamsError, match=r"serving\.explain\.map is true, but export\.precision is float16; set map to"
    ):
        params({"serving.explain.map": True, "export.precision": "float16"})
    assert params({"serving.explain.map": True}).serving.explain.map

"""Rows of benchmarks/encoder_accuracy.py: each trains networks in the working folder, a project, or reads trained ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.accuracy import classification_alone, merged
from benchmarks.encoder_projects import gml_params, tuned_params
from benchmarks.feature_classifiers import knn, logistic_regression
from benchmarks.language_guided import train_language_guided
from models.networks.memory import FeatureMemory, build_memory
from models.networks.memory_fit import LEAST_WEIGHT, fit_memory
from pipeline import classifier, student, teacher
from pipeline.data.class_prior import Prior
from pipeline.data.dataset import AnyImages, evaluation_images
from pipeline.evaluation.network_metrics import network_logits
from pipeline.features.stored import FeatureImages
from pipeline.model_io.devices import choose_device
from pipeline.params import Params
from pipeline.params.recipe import with_overlay
from pipeline.shared.artifacts import TEXT, sha256_of, sha256_of_json
from pipeline.text.stored import FEATURES_FILE, TextFeatures
from pipeline.training.method_setup import class_means

METHODS = Path("recipes/methods")
SECOND_STAGES = {"NCM": "ncm.yaml", "cRT": "crt.yaml", "tau-normalisation": "tau_norm.yaml", "LWS": "lws.yaml"}


@dataclass(frozen=True)
class Features:
    """The features of the three splits of a project, and its class prior."""

    train: FeatureImages
    validation: FeatureImages
    test: FeatureImages
    prior: Prior
    text: TextFeatures | None = None


Logits = tuple[np.ndarray, np.ndarray]  # balanced logits of validation and test


@dataclass(frozen=True)
class Row:
    """A row of the table. logits: (params of one seed, features) → balanced logits. plain: report the target prior train.

    sections: sections of params that the result depends on; a row without sections has no seeds. changes: from params of the
    recipe to params of the row.
    """

    name: str
    logits: Callable[[Params, Features], Logits]
    sections: tuple[str, ...] = ()
    plain: bool = False
    changes: Callable[[Params], Params] = lambda params: params


def rows() -> list[Row]:
    """Return all rows in the order of the table."""
    teacher_sections, both = ("teacher",), ("teacher", "student")
    return [
        Row("kNN", lambda _, data: _without_training(knn, data)),
        Row("LogisticRegression balanced", lambda _, data: _without_training(logistic_regression, data)),
        Row("cross-entropy", cross_entropy, teacher_sections, plain=True),
        Row("cross-entropy, post-hoc", cross_entropy, teacher_sections),
        Row("L_cls", l_cls, teacher_sections),
        Row("L_cls, adapter", l_cls_adapter, both, changes=gml_params),
        Row("GML", gml, both, changes=gml_params),
        Row("memory alone", lambda _, data: with_memory(None, data)),
        Row("L_cls + memory", lambda params, data: with_memory(l_cls(params, data), data), teacher_sections),
        Row("GML + memory", lambda params, data: with_memory(gml(params, data), data), both, changes=gml_params),
        *(
            Row(
                name,
                second_stage,
                ("student", "classifier"),
                changes=functools.partial(with_overlay, overlay=METHODS / file),
            )
            for name, file in SECOND_STAGES.items()
        ),
    ]


def text_rows() -> list[Row]:
    """Return the rows that need text features."""
    both = ("teacher", "student")
    return [
        Row("zero-shot", zero_shot),
        Row("VL-LTR's second stage", language_guided, ("encoder",)),
        Row("GML with text centres", gml, both, changes=functools.partial(gml_params, keys="text")),
        Row(
            "GML with image and text centres", gml, both, changes=functools.partial(gml_params, keys="teacher_and_text")
        ),
    ]


def memory_rows(limits: list[int]) -> list[Row]:
    """Return a row of the memory alone for each number of stored features."""

    def alone(limit: int, _: Params, data: Features) -> Logits:
        return with_memory(None, data, limit)

    return [Row(f"memory alone, {limit} rows", functools.partial(alone, limit)) for limit in limits]


def tuned_rows() -> list[Row]:
    """Return the rows whose student trains the encoder's last blocks on images: minutes an epoch."""
    alone = {"student": {"beta": 0.0, "alpha": 0.0}}
    return [
        Row("L_cls, last blocks", student_alone, ("student",), changes=lambda p: tuned_params(merged(p, alone))),
        Row("GML, last blocks", gml, ("teacher", "student"), changes=lambda p: tuned_params(gml_params(p))),
    ]


def _without_training(classifier: Callable[..., Logits], data: Features) -> Logits:
    train, validation, test = ((split.images[:, 0], split.labels) for split in (data.train, data.validation, data.test))
    return classifier(*train, *validation, test[0], len(data.prior.classes))


def cross_entropy(params: Params, data: Features) -> Logits:
    """Return logits of the recipe's teacher, trained without logit adjustment."""
    params = merged(params, {"teacher": {"adjustment": 0.0}})
    return network(params, data, "teacher", lambda output: teacher.run(params, output))


def l_cls(params: Params, data: Features) -> Logits:
    """Return logits of the recipe's teacher."""
    return network(params, data, "teacher", lambda output: teacher.run(params, output))


def l_cls_adapter(params: Params, data: Features) -> Logits:
    """Return logits of the network of row GML, trained with L_cls alone."""
    return network(params, data, "adapter", lambda output: classification_alone(params, 1.0, output))


def gml(params: Params, data: Features) -> Logits:
    """Return logits of the recipe's student with L_GML, against the features of the recipe's teacher or of texts."""

    def train(output: Path) -> None:
        if params.student.contrast_encoder != "text":
            l_cls(params, data)
        student.run(params, output, run_folder(params, "teacher"))

    return network(params, data, "student", train)


def student_alone(params: Params, data: Features) -> Logits:
    """Return logits of the student of params without a term that needs a teacher."""
    return network(params, data, "student", lambda output: student.run(params, output))


def second_stage(params: Params, data: Features) -> Logits:
    """Return logits of a second stage of the student of the same params, which is trained first."""

    def train(output: Path) -> None:
        first = run_folder(params, "student")
        student_alone(params, data)
        classifier.run(params, output, first)

    return network(params, data, "classifier", train)


def zero_shot(_: Params, data: Features) -> Logits:
    """Return the cosines of the images with the mean sentence of each class, 100 times as in CLIP."""
    assert data.text is not None
    means = class_means(
        torch.from_numpy(data.text.features), torch.from_numpy(data.text.row_class), len(data.prior.classes)
    )
    validation, test = (
        (100 * F.normalize(split.images[:, 0].float(), dim=1) @ means.T).numpy()
        for split in (data.validation, data.test)
    )
    return validation, test


def language_guided(params: Params, data: Features) -> Logits:
    """Return the log probabilities of VL-LTR's second stage on the features of the images and of the sentences."""
    assert data.text is not None
    sentences, row_class = torch.from_numpy(data.text.features), torch.from_numpy(data.text.row_class)
    model = train_language_guided(data.train.images[:, 0], data.train.labels, sentences, row_class, params.seed)
    with torch.inference_mode():
        validation, test = (
            torch.cat([model.log_probabilities(part.float()) for part in split.images[:, 0].split(256)]).numpy()
            for split in (data.validation, data.test)
        )
    return validation, test


def run_folder(params: Params, kind: str) -> Path:
    """Return the folder of a trained network; its name is a hash of the params and texts that the network depends on."""
    sections = {
        "teacher": {"seed", "teacher"},
        "adapter": {"seed", "student"},
        "student": {"seed", "teacher", "student"},
        "classifier": {"seed", "teacher", "student", "classifier"},
    }
    depends = {
        **params.model_dump(mode="json", include=sections[kind]),
        **rounding(params),
        **text_hash(params if kind == "student" else None),
    }
    return Path(f"runs/{kind}-{sha256_of_json(depends)[:12]}")


def network(params: Params, data: Features, kind: str, train: Callable[[Path], object]) -> Logits:
    """Return balanced logits of a network. It is trained unless its folder exists."""
    folder = run_folder(params, kind)
    if not (folder / "model.safetensors").is_file():
        train(folder)
    device = choose_device(params.device)
    stage = kind if kind in ("teacher", "classifier") else "student"
    splits: list[AnyImages] = [data.validation, data.test]
    if kind == "student" and params.student.tune != "none":
        splits = [evaluation_images(params, split) for split in ("validation", "test")]
    validation, test = (network_logits(folder, stage, split, params.image, data.prior, device) for split in splits)
    return validation, test


def with_memory(base: Logits | None, data: Features, limit: int | None = None) -> Logits:
    """Add the logits of the memory to `base`; None: return those of the memory alone. limit: its rows; None: all images."""
    classes = len(data.prior.classes)
    validation, test = base or tuple(np.zeros((len(s), classes), np.float32) for s in (data.validation, data.test))
    stored = build_memory(data.train.images[:, 0], data.train.labels, classes, limit or len(data.train))
    least = LEAST_WEIGHT if base is None else 0.0
    fit = fit_memory(stored, data.validation.images[:, 0], data.validation.labels, torch.from_numpy(validation), least)
    memory = FeatureMemory(stored, classes, fit.tau, fit.weight)
    with torch.inference_mode():
        added = [
            torch.cat([memory(part) for part in split.images[:, 0].split(256)]).numpy()
            for split in (data.validation, data.test)
        ]
    return validation + added[0], test + added[1]


def rounding(params: Params) -> dict[str, str]:
    """engine.precision, if it is bfloat16: runs of float32 have the hash that they had before the option."""
    return {"precision": "bfloat16"} if params.engine.precision == "bfloat16" else {}


TEXT_ALONE = (zero_shot, language_guided)  # depend on the texts, whatever the params of the student


def text_hash(params: Params | None, alone: bool = False) -> dict[str, str]:
    """Hash of the text features, if the result depends on them."""
    uses = alone or (params is not None and params.student.uses_text)
    return {"text": sha256_of(TEXT / FEATURES_FILE)} if uses else {}

"""Stage `evaluate`: evaluate teacher and student on the test split for both target priors; writes artifacts/evaluation/."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from models.prior import calibrate_logits, softmax
from models.sample_size import from_json, warnings_of
from pipeline.answers.fit import Answers, fit_answers
from pipeline.answers.hierarchy import taxonomy_record
from pipeline.answers.prediction_sets import covered_columns
from pipeline.answers.reasons import Mistake, confident_mistakes
from pipeline.command_line import stage_main
from pipeline.data.class_prior import Prior, load_prior
from pipeline.data.dataset import AnyImages, evaluation_images, normalise
from pipeline.data.split_tables import load_taxonomy, read_groups
from pipeline.evaluation.metrics import per_class_accuracy
from pipeline.evaluation.network_metrics import (
    network_logits,
    network_metrics,
    probabilities_by_target_prior,
    student_parts,
)
from pipeline.evaluation.predictions import (
    CALIBRATION_NOTE,
    COVERAGE_NOTE,
    GateError,
    Predictions,
    check_comparable,
    load_predictions,
)
from pipeline.evaluation.runs import load_run
from pipeline.evaluation.segmentation import evaluate_networks
from pipeline.features.stored import evaluation_inputs, stored_encoder, takes_features
from pipeline.model_io.checkpoint import BEST, attach_encoder, load_config, load_model, student_folder
from pipeline.model_io.devices import choose_device
from pipeline.model_io.inference import EVALUATION_BATCH, outputs
from pipeline.onnx_export.activation_map import maps_of_classes
from pipeline.params import ImageParams, Params
from pipeline.report import Evaluation, Provenance, analyse_predictions, render_report, render_segmentation_report
from pipeline.report.analysis import write_plots
from pipeline.report.data_card import SplitSizes, data_card, data_facts
from pipeline.report.model_card import model_card, model_facts, network_name
from pipeline.shared.artifacts import (
    ANSWERS,
    EVALUATION,
    STUDENT,
    TEACHER,
    as_csv,
    whole_folder,
    write_file,
    write_json,
)
from pipeline.shared.errors import DataError
from pipeline.shared.lineage import code_revision
from serving.shared.terminal import print

NETWORKS = {"teacher": TEACHER, "student": STUDENT}


@dataclass(frozen=True)
class Result:
    """Content of metrics.json: network, then target prior, then metric."""

    metrics: dict[str, Any]
    output: Path

    def __str__(self) -> str:
        balanced = {network: self.metrics[network]["balanced"] for network in ("teacher", "student")}
        name = "balanced accuracy" if "balanced_accuracy" in balanced["student"] else "mIoU"
        key = name.replace(" ", "_").lower()
        scores = [f"{network} {values[key]:.1%}" for network, values in balanced.items()]
        page = self.output / "report.html"
        return f"{name} {', '.join(scores)} → {page} ({page.stat().st_size / 1e6:.1f} MB)"


def run(params: Params, output: Path = EVALUATION) -> Result:
    """Evaluate both networks on the test split; no other stage reads it. Raises DataError when it is empty."""
    if params.segmentation:
        return _evaluate_segmentation(params, output)
    prior, inputs = load_prior(), evaluation_inputs(params, "test")
    test = inputs["student"]
    if len(test) == 0:
        raise DataError(
            "data/split/test.parquet: holds no images; set data.test_per_class or give the source a test split"
        )
    data, image, settings = params.data, params.image, params.evaluate
    device, labels = choose_device(params.device), test.labels.numpy()
    champion, notes = _champion(settings.champion, test, labels, prior)
    student, stage = student_folder(params)
    logits = {
        "teacher": network_logits(TEACHER, "teacher", inputs["teacher"], image, prior, device),
        "student": network_logits(student, stage, test, image, prior, device),
    }
    probabilities = {name: probabilities_by_target_prior(values, prior) for name, values in logits.items()}
    further = _further_logits(test, image, prior, device, refitted=student != STUDENT)
    metrics = {name: network_metrics(values, labels, prior, settings) for name, values in (logits | further).items()}
    validation, held_out = None, evaluation_inputs(params, "validation")["student"]
    if len(held_out):
        validation = network_logits(student, stage, held_out, image, prior, device), held_out.labels.numpy()
    answers = fit_answers(validation, (logits["student"], labels), prior, settings, params.serving)
    served = answers.temperature if params.serving.calibration == "temperature" else None
    served_logits = calibrate_logits(logits["student"], served or 1.0)
    hierarchy = taxonomy_record(load_taxonomy(), served_logits, labels, prior)
    mistakes, train = _mistakes(params, test, served_logits, prior, device)
    groups = read_groups("test")
    figures = analyse_predictions(
        logits, labels, prior, settings.ece_bins, data.seed, temperature=answers.temperature,
        champion=champion, groups=groups and (groups, set(read_groups("train") or [])),
    )  # fmt: skip
    chosen = choose_samples(probabilities["student"], settings.samples, data.seed)
    sizes = SplitSizes(sum(prior.counts), len(held_out), len(test))
    _warn_of_few_images(metrics)
    about_data = data_facts(data, image, prior, sizes)
    about_model, memory = _model_facts(params, prior, student, stage)
    with whole_folder(output) as folder:
        classes = _per_class(probabilities, labels, prior)
        _write_tables(folder, metrics, classes, probabilities["student"]["balanced"], labels, prior)
        write_plots(figures, folder / "plots")
        table = _predictions(test, probabilities["student"], logits["student"], served_logits, answers, prior)
        pyarrow.parquet.write_table(table, folder / "predictions.parquet")
        write_json(folder / ANSWERS.name, answers.as_json() | {"taxonomy": hierarchy})
        samples = _write_samples(folder / "samples", test, chosen, probabilities["student"], prior.classes)
        write_file(folder / "data_card.md", data_card(data, about_data, prior, sizes, memory))
        card = model_card(data, network_name(params), params.seed, about_model, prior, metrics["student"])
        write_file(folder / "model_card.md", card)
        evaluation = Evaluation(
            figures, metrics, classes, samples, prior, test.encoded, about_data, about_model,
            params.model_dump(mode="json"), notes=notes, provenance=_provenance(), answers=answers, taxonomy=hierarchy,
            mistakes=mistakes, train_image=train and train.encoded,
        )  # fmt: skip
        write_file(folder / "report.html", render_report(evaluation))
    return Result(metrics, output)


def _model_facts(
    params: Params, prior: Prior, student: Path, stage: str
) -> tuple[list[tuple[str, str]], dict[str, Any] | None]:
    """Return the facts of the model card, and the record of the student's memory if it has one."""
    config, strength, encoder = load_config(student, stage), params.serving.strength, stored_encoder(params)
    facts = model_facts(
        params.teacher, params.student, params.image.size, strength, prior, encoder, config.memory, config.second_stage
    )
    return facts, config.memory


def _mistakes(
    params: Params, test: AnyImages, logits: np.ndarray, prior: Prior, device: torch.device
) -> tuple[list[Mistake], AnyImages | None]:
    """The most confident mistakes with what serving.explain wants: nearest training images and activation maps.

    Also returns the training split, or None if no training images are wanted. logits: of the test split, calibrated, balanced.
    """
    explain = params.serving.explain
    if not explain.images and not explain.map:
        return [], None
    train = evaluation_inputs(params, "train")["student"] if explain.images else None
    folder, stage = student_folder(params)
    model = load_model(folder, stage)[0].to(device)

    def features(images: AnyImages, rows: torch.Tensor) -> torch.Tensor:
        return outputs(model, images.batches(rows, EVALUATION_BATCH), params.image, device)[0]

    def maps(rows: torch.Tensor, chosen: np.ndarray) -> np.ndarray | None:
        images = test
        if takes_features(params, "student"):  # of the few rows alone, the pixels are read
            stream = params.stream.model_copy(update={"mode": "on"})
            images = evaluation_images(params.model_copy(update={"stream": stream}), "test")
        mapped, config = load_model(folder, stage)
        attach_encoder(mapped, config, params, folder)
        pixels = normalise(images.pixels(rows).to(device), params.image)
        return maps_of_classes(mapped.to(device), pixels, chosen)

    wanted = maps if explain.map else None
    return confident_mistakes(features, test, softmax(logits), train, prior.classes, explain.images, wanted), train


def _evaluate_segmentation(params: Params, output: Path) -> Result:
    """Evaluate both networks on the test split at several strengths; write metrics, tables and the report."""
    prior = load_prior()
    result = evaluate_networks(params, prior, NETWORKS, choose_device(params.device))
    with whole_folder(output) as folder:
        result.write(folder)
        write_json(folder / ANSWERS.name, {"calibration": None, "sets": None})  # of classifiers only
        page = render_segmentation_report(result, prior, params.model_dump(mode="json"), _provenance())
        write_file(folder / "report.html", page)
    return Result(result.metrics, output)


def _further_logits(
    test: AnyImages, image: ImageParams, prior: Prior, device: torch.device, *, refitted: bool
) -> dict[str, np.ndarray]:
    """Logits that have metrics only: of parts of the student, and of its best epoch if it was kept."""
    logits = student_parts(STUDENT, test, image, prior, device, refitted=refitted)
    if (STUDENT / BEST).is_dir():
        # Listed separately: a score of an epoch that was selected by its score must be labelled as such.
        best = network_logits(STUDENT / BEST, "student", test, image, prior, device)
        logits = logits | {"student_best_epoch": best}
    return logits


def _warn_of_few_images(metrics: dict[str, Any]) -> None:
    for line in warnings_of(from_json(metrics["student"]["balanced"]["test_images"])):
        print(f"evaluate: warning: {line}", file=sys.stderr)


def _write_tables(
    folder: Path,
    metrics: dict[str, Any],
    classes: list[dict[str, Any]],
    probabilities: np.ndarray,
    labels: np.ndarray,
    prior: Prior,
) -> None:
    """Write metrics.json, a metrics file per network and target prior, per_class.csv and confusion.csv."""
    write_json(folder / "metrics.json", metrics)
    for network, by_prior in metrics.items():
        for name, values in by_prior.items():
            write_json(folder / "metrics" / f"{network}_{name}.json", flat(values))
    write_file(folder / "per_class.csv", as_csv(classes))
    predicted = probabilities.argmax(1)
    pairs = [
        {"actual": prior.classes[a], "predicted": prior.classes[b]} for a, b in zip(labels, predicted, strict=True)
    ]
    write_file(folder / "confusion.csv", as_csv(pairs))


def _provenance() -> Provenance:
    """Date, commit, and the epochs of each network that was trained here, for the report."""
    histories = {
        name: [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for name, folder in NETWORKS.items()
        if (folder / "metrics.jsonl").is_file()
    }
    return Provenance(datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), code_revision(), histories)


def _champion(
    folder: str | None, test: AnyImages, labels: np.ndarray, prior: Prior
) -> tuple[Predictions | None, list[str]]:
    """Predictions of the run in `folder` (evaluate.champion), or a note why they cannot be compared with this run.

    Raises ParamsError when the run does not exist.
    """
    if folder is None:
        return None, []
    try:
        champion = load_predictions(load_run(Path(folder)))
        order = np.argsort(np.array(test.sample_ids))
        challenger = Predictions([test.sample_ids[i] for i in order], labels[order], champion.probabilities, prior)
        check_comparable(challenger, champion)
    except GateError as error:  # other classes or another test set must not fail this evaluation
        return None, [f"Without the champion of evaluate.champion: {error}."]
    return champion, []


def flat(values: dict[str, Any]) -> dict[str, float | None]:
    """Metrics of one target prior without nested mappings, as `dvc metrics show` needs them: one row per file."""
    plain = {name: value for name, value in values.items() if not isinstance(value, dict)}
    plain |= {f"{name}_at_prior": value for name, value in values["at_target_prior"].items()}
    return plain | {"test_images": values["test_images"]["all"]["images"]}


def choose_samples(by_prior: dict[str, np.ndarray], count: int, seed: int) -> list[int]:
    """Choose test images to save: up to half of them with different classes for the two target priors, the rest at random."""
    disagree = np.flatnonzero(by_prior["balanced"].argmax(1) != by_prior["train"].argmax(1))
    generator = np.random.default_rng(seed)
    first = generator.permutation(disagree)[: (count + 1) // 2].tolist()
    others = np.setdiff1d(np.arange(len(by_prior["balanced"])), first)
    return sorted(first + generator.permutation(others)[: count - len(first)].tolist())


def _per_class(networks: dict[str, dict[str, np.ndarray]], labels: np.ndarray, prior: Prior) -> list[dict[str, Any]]:
    accuracies = {
        f"{network}_{name}": per_class_accuracy(probabilities.argmax(1), labels, len(prior.classes))
        for network, by_prior in networks.items()
        for name, probabilities in by_prior.items()
    }
    tested = np.bincount(labels, minlength=len(prior.classes))
    return [
        {
            "class": name,
            "group": prior.groups[c],
            "train_count": prior.counts[c],
            "test_count": int(tested[c]),
            **{key: values[c] for key, values in accuracies.items()},
        }
        for c, name in enumerate(prior.classes)
    ]


def _predictions(
    test: AnyImages,
    by_prior: dict[str, np.ndarray],
    logits: np.ndarray,
    calibrated: np.ndarray,
    answers: Answers,
    prior: Prior,
) -> pa.Table:
    """Table of the predictions; with the calibration and the prediction sets as served, which the gate compares."""
    columns: dict[str, Any] = {"sample_id": list(test.sample_ids), "label": test.labels.numpy()}
    for name, probabilities in by_prior.items():
        columns[f"predicted_{name}"] = probabilities.argmax(1)
        columns[f"probability_{name}"] = probabilities.max(1)
    columns["logits"] = pa.array(list(logits), type=pa.list_(pa.float32()))
    notes = {CALIBRATION_NOTE: json.dumps(answers.calibration)}
    covered = covered_columns(answers.sets, calibrated, columns["label"], prior)
    if answers.sets:
        columns |= {f"covered_{name}": values for name, values in covered.items()}
        notes[COVERAGE_NOTE] = json.dumps(answers.sets["coverage"])
    return pa.table(columns).replace_schema_metadata(notes)


def _write_samples(
    folder: Path, test: AnyImages, chosen: list[int], by_prior: dict[str, np.ndarray], classes: list[str]
) -> list[dict[str, Any]]:
    folder.mkdir()
    samples = []
    for number, index in enumerate(chosen):
        data = test.encoded(index)
        suffix = {b"\x89PNG": "png", b"RIFF": "webp"}.get(data[:4], "jpg")
        name = f"{number:03d}.{suffix}"
        write_file(folder / name, data)
        predicted = {prior: classes[int(values[index].argmax())] for prior, values in by_prior.items()}
        samples.append({"file": name, "label": classes[int(test.labels[index])], **predicted})
    write_file(folder / "samples.csv", as_csv([{"file": s["file"], "label": s["label"]} for s in samples]))
    return [{**sample, "bytes": test.encoded(index)} for sample, index in zip(samples, chosen, strict=True)]


if __name__ == "__main__":
    sys.exit(stage_main(run, "Evaluate teacher and student on the test split."))

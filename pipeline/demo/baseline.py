"""`python -m pipeline.demo.baseline`: compare the student with plain cross-entropy on the same data (`make demo`).

Trains the student's network with plain cross-entropy (the student's epochs, schedule, augmentation and seed; no logit
adjustment, no teacher), evaluates both on the test split and prints accuracy for all images and by group. The test
split selects nothing: both networks are those of the last epoch. Memory and time are those of one teacher.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from models.sample_size import sample_sizes, warnings_of
from pipeline.command_line import stage_main
from pipeline.data.class_prior import Prior, load_prior
from pipeline.data.dataset import AnyImages
from pipeline.evaluation.comparison import Measure, compare
from pipeline.evaluation.metrics import GROUPS, adjusted_probabilities
from pipeline.evaluation.network_metrics import TARGET_PRIORS, network_logits
from pipeline.evaluation.predictions import Predictions
from pipeline.features.stored import evaluation_inputs, stored_encoder
from pipeline.model_io.checkpoint import student_folder
from pipeline.model_io.devices import choose_device, joined_ranks
from pipeline.params import ImageParams, Params, StudentParams, TrainingParams
from pipeline.shared.artifacts import EMBEDDINGS_INDEX, PRIOR, SPLIT
from pipeline.shared.errors import DataError
from pipeline.training.run import model_config, run_folder, stage_seed, teacher_objective, train_network
from serving.shared.terminal import Console, counted

FOLDER = Path("artifacts/baseline")
# Short, so that the table fits into 80 columns.
PLAIN, CORRECTED, STUDENT_ROW = "cross-entropy", " minus log prior", "Tailor's student"
COLUMNS = ("all", *GROUPS)


@dataclass(frozen=True)
class Result:
    """Number of compared test images, and the folder of the network trained with plain cross-entropy."""

    images: int
    output: Path

    def __str__(self) -> str:
        return f"compared on {counted(self.images, 'test image')} → {self.output}"


def run(params: Params, folder: Path = FOLDER) -> Result:
    """Train with plain cross-entropy unless `folder` has the network already, and print the table.

    Raises DataError if the test split is empty.
    """
    prior, inputs_of = load_prior(), evaluation_inputs(params, "test")
    test = inputs_of["student"]
    if len(test) == 0:
        raise DataError("data/split/test.parquet: holds no images; the comparison needs a test split")
    plain = classification_section(params.student, adjustment=0.0)
    inputs = [SPLIT / "train.parquet", PRIOR, *([EMBEDDINGS_INDEX] if params.encoder else [])]
    name = run_folder(plain, params.image, params.engine, params.stream, params.seed, folder, inputs).fingerprint[:12]
    output = folder / name
    if not (output / "model.safetensors").is_file():
        recipe = params.model_copy(update={"teacher": plain})
        config = model_config(plain, params.image, len(prior.classes), stored_encoder(params))
        with joined_ranks(params.device) as device:
            objective = teacher_objective(plain, config, prior, stage_seed(params.seed, "teacher"))
            train_network("teacher", objective, config, recipe, prior, device, output, inputs)
    device, image = choose_device(params.device), params.image
    predictions = {
        PLAIN: _predict(output, "teacher", image, inputs_of["teacher"], prior, device, "train"),
        CORRECTED: _predict(output, "teacher", image, inputs_of["teacher"], prior, device, "balanced"),
        STUDENT_ROW: _predict(*student_folder(params), image, test, prior, device, "balanced"),
    }
    measures = {
        name: compare(row, predictions[PLAIN], params.gate, params.evaluate.ece_bins)
        for name, row in predictions.items()
    }
    console = Console()
    console.print(gain_table(measures, predictions[PLAIN], params.gate.confidence))
    console.print(limits(params.student.epochs, prior, len(test)), highlight=False)
    tested = np.bincount(test.labels.numpy(), minlength=len(prior.classes))
    for line in warnings_of(sample_sizes(tested, prior.groups)):
        console.print(f"warning: {line}", highlight=False)
    return Result(len(test), output)


def classification_section(student: StudentParams, adjustment: float) -> TrainingParams:
    """The student's params with cross-entropy of this adjustment as the only term, on the same network."""
    section = student.model_dump(include=set(TrainingParams.model_fields) - {"loss"})
    return TrainingParams.model_validate({**section, "adjustment": adjustment})


def _predict(
    folder: Path, stage: str, image: ImageParams, test: AnyImages, prior: Prior, device: torch.device, target_prior: str
) -> Predictions:
    logits = network_logits(folder, stage, test, image, prior, device)
    probabilities = adjusted_probabilities(logits, np.array(prior.log_prior), TARGET_PRIORS[target_prior])
    return Predictions(list(test.sample_ids), test.labels.numpy(), probabilities, prior)


def gain_table(measures: dict[str, dict[str, Measure]], plain: Predictions, confidence: float) -> Table:
    """Table of accuracies in percent, and the student's difference from plain cross-entropy with its interval.

    measures: row → all, many, medium, few, compared with plain cross-entropy.
    """
    groups = np.array(plain.prior.groups)[plain.labels]
    tested = [int((groups == group).sum()) for group in GROUPS]
    table = Table(title=f"Accuracy on {counted(len(plain.labels), 'test image')}: gain of Tailor")
    table.add_column("", no_wrap=True)
    for column, images in zip(COLUMNS, (len(plain.labels), *tested), strict=True):
        table.add_column(f"{column}\n{counted(images, 'image')}", justify="right")
    for name, row in measures.items():
        table.add_row(
            name, *(_points("{:.1f} %", row[column].challenger) for column in COLUMNS), end_section=name == STUDENT_ROW
        )
    student = measures[STUDENT_ROW]
    table.add_row("difference", *(_points("{:+.1f}", student[column].difference) for column in COLUMNS))
    table.add_row(
        f" {100 * confidence:g} % interval",
        *(_points("{:.1f} to {:.1f}", student[column].low, student[column].high) for column in COLUMNS),
    )
    return table


def _points(form: str, *values: float | None) -> str:
    """Format shares in percentage points; n/a if one is None."""
    return "n/a" if None in values else form.format(*(100 * value for value in values))


def limits(epochs: int, prior: Prior, tested: int) -> str:
    """Text below the table: what was trained, and the limits of the comparison."""
    images, names = sum(prior.counts), len(prior.classes)
    return (
        f"cross-entropy: plain, with the student's network, epochs ({epochs}), augmentation and seed, on "
        f"the same {counted(images, 'training image')} of {names} classes, {max(prior.counts):,} of the largest and "
        f"{min(prior.counts):,} of the smallest. minus log prior: the same network, its logits adjusted after training. "
        "difference: student − cross-entropy; the student also needs a teacher, two trainings instead of one.\n"
        f"The table shows in which direction accuracy moves on these data. One seed and {counted(tested, 'test image')}: a "
        "difference whose interval contains 0 may be due to chance, the interval excludes the spread between seeds, and "
        "the gain depends on the data. docs/results.md has several seeds on CIFAR."
    )


if __name__ == "__main__":
    sys.exit(stage_main(run, "Compare the student with plain cross-entropy on the test split."))

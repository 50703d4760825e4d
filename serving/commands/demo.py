"""`tailor demo`: serve a repository and classify sample images under two priors over both protocols."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from serving.client.sync_client import Client, Prediction
from serving.commands.options import REPOSITORY, Debug
from serving.server.triton_server import TritonServer
from serving.shared.errors import InputError, ServingError
from serving.shared.terminal import Console, cell, counted, plain_cell

PRIORS = ("balanced", "train")
TOLERANCE = 1e-5
SAMPLES = Path("artifacts/evaluation/samples")  # written by stage evaluate


@dataclass(frozen=True)
class Sample:
    """One image file and its true class."""

    path: Path
    label: str


def run(repository: Path, samples: Path) -> int:
    """Serve `repository`, classify every image of `samples`/samples.csv, print a table; return the number of changes.

    A change is an image whose best class differs between the two priors.
    Raises ServingError when HTTP and gRPC disagree or when the server does not start or stop cleanly; InputError for
    invalid samples.
    """
    images = read_samples(samples)
    console = Console()
    server = TritonServer(repository, http_port=0, grpc_port=0, metrics_port=0)
    try:
        server.start()
        console.print(f"ready {server.http_url} {server.grpc_url}", highlight=False)
        paths, predictions = [sample.path for sample in images], {}
        with Client(server.http_url) as http, Client(server.grpc_url) as grpc:
            for prior in PRIORS:
                predictions[prior] = http.predict(paths, prior)
                check_protocols_agree(images, predictions[prior], grpc.predict(paths, prior))
    finally:
        status = server.stop()
    differing = [a.indexes[0] != b.indexes[0] for a, b in zip(*(predictions[prior] for prior in PRIORS), strict=True)]
    console.print(comparison_table(images, predictions, differing))
    console.print(
        f"HTTP and gRPC agree on {counted(len(images), 'image')}; the prior changes the answer for {sum(differing)}."
    )
    console.print(explanation(images, predictions, differing), highlight=False)
    if status != 0:
        raise ServingError(f"the Triton server ended with status {status}, not 0")
    console.print("The server was stopped cleanly.")
    return sum(differing)


def explanation(images: list[Sample], predictions: dict[str, list[Prediction]], differing: list[bool]) -> str:
    """Return the text below the table: what the comparison shows, and what it does not."""
    if not any(differing):
        return (
            "No answer changes here, only the probabilities: the student is confident on these images, or undertrained."
        )
    changed = [index for index, differs in enumerate(differing) if differs]
    correct = {
        prior: sum(of_prior[index].classes[0] == images[index].label for index in changed)
        for prior, of_prior in predictions.items()
    }
    return (
        f"Of these {len(changed)}, balanced is right for {correct['balanced']}, train for {correct['train']}. Images with "
        "changed answers were selected for this table,\nso it shows what the prior does, not how accurate the model is. "
        "balanced is for data whose classes are equally\nfrequent; train is for data whose classes are as frequent as in "
        "training."
    )


def read_samples(folder: Path) -> list[Sample]:
    """Read samples.csv (columns file, label). Raises InputError naming the file and line."""
    path = folder / "samples.csv"
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            if not {"file", "label"} <= set(reader.fieldnames or ()):
                raise InputError(f"{path}: has columns {reader.fieldnames}; expected file and label")
            rows = list(reader)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; run `dvc repro evaluate` or give --samples") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: is not CSV text: {error}") from None
    for line, row in enumerate(rows, start=2):
        if not row["file"] or not row["label"]:
            raise InputError(f"{path}: line {line} lacks a file or a label")
    if not rows:
        raise InputError(f"{path}: lists no image; run `dvc repro evaluate`")
    return [Sample(folder / plain_cell(row["file"]), plain_cell(row["label"])) for row in rows]


def check_protocols_agree(images: list[Sample], over_http: list[Prediction], over_grpc: list[Prediction]) -> None:
    """Raise ServingError naming the first image whose predictions differ between the two protocols."""
    for sample, http, grpc in zip(images, over_http, over_grpc, strict=True):
        gap = max(abs(a - b) for a, b in zip(http.probabilities, grpc.probabilities, strict=True))
        if http.indexes != grpc.indexes or not gap <= TOLERANCE:
            raise ServingError(f"{sample.path}: HTTP returns {http}, gRPC returns {grpc}; expected the same")


def comparison_table(images: list[Sample], predictions: dict[str, list[Prediction]], differing: list[bool]) -> Table:
    """Table with a row per image: true class, prediction and probability under each prior, a mark where they differ."""
    table = Table(title="One model, two target priors")
    table.add_column("image", overflow="fold")
    table.add_column("truth", overflow="fold")
    for prior in PRIORS:
        table.add_column(prior, overflow="fold")
    table.add_column("differs", justify="center")
    for index, sample in enumerate(images):
        cells = []
        for prior in PRIORS:
            prediction = predictions[prior][index]
            text = f"{cell(prediction.classes[0])} {prediction.probabilities[0]:.3f}"
            cells.append(f"[green]{text}[/]" if prediction.classes[0] == sample.label else text)
        table.add_row(cell(sample.path.name), cell(sample.label), *cells, "≠" if differing[index] else "")
    return table


def demo(
    repository: Annotated[Path, typer.Option(help="Triton model repository.")] = REPOSITORY,
    samples: Annotated[Path, typer.Option(help="Folder with samples.csv and its images.")] = SAMPLES,
    debug: Debug = False,
) -> None:
    """Compare two priors on sample images.

    Serves the repository on free ports, sends every sample under both priors and over both protocols, prints a table and
    stops the server.
    """
    run(repository, samples)

"""`tailor predict`, `tailor segment`, `tailor status`: classify or segment images on a server, and show its state."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track
from rich.table import Table

from models.image_names import SUFFIXES, has_image_suffix
from models.preprocess import decode
from serving.client.extras import Extras, read_costs
from serving.client.images import image_files
from serving.client.predictions import (
    CSV_COLUMNS,
    EXTRA_COLUMNS,
    Prediction,
    Status,
    as_mapping,
    as_rows,
    best_classes,
    extras_text,
)
from serving.client.sync_client import Client, read_image
from serving.commands.options import (
    AsJson,
    CaFile,
    Debug,
    Headers,
    ProtocolOption,
    Timeout,
    Url,
    parse_headers,
    print_json,
    server_url,
)
from serving.shared.errors import InputError, ServingError
from serving.shared.terminal import Console, cell, counted, print

BAR_FROM = 100  # images; fewer finish too fast for a progress bar


def predict(
    images: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE...", help="JPEG, PNG or WebP files, or folders with such files.", show_default=False
        ),
    ],
    url: Url = None,
    protocol: ProtocolOption = None,
    prior: Annotated[
        str | None,
        typer.Option(
            metavar="balanced|train|live|NUMBER|FILE",
            help="Class prior of the predictions: balanced, train, live (estimated by `tailor drift --write`), a strength "
            "(0 is balanced, 1 is train), or a file with the probabilities (JSON list, JSON object by class name, or a number "
            "per line). The server's default if not given.",
        ),
    ] = None,
    coverage: Annotated[
        float | None,
        typer.Option(help="Also print the set of classes that has the right one with this probability, such as 0.9."),
    ] = None,
    costs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also print the class of least expected cost. JSON: {class name: cost of missing it}, a number per class, "
            "or a list of costs of every answer for each true class.",
        ),
    ] = None,
    ask: Annotated[
        float | None, typer.Option(help="Price of asking a person, printed where every class costs more.")
    ] = None,
    unknown: Annotated[
        float | None,
        typer.Option(
            metavar="RATE",
            help="Also print whether the image resembles no class, at this rate of false alarms, such as 0.05.",
        ),
    ] = None,
    level: Annotated[
        float | None,
        typer.Option(help="Also print the deepest node of the taxonomy whose classes together have this probability."),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Also print the nearest training images, and in JSON the class-activation map."),
    ] = False,
    top: Annotated[
        int | None,
        typer.Option(help="Number of classes printed, at least 1; all that the server returns if not given."),
    ] = None,
    timeout: Timeout = 60.0,
    header: Headers = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, a row for each image and class.")] = False,
    debug: Debug = False,
) -> None:
    """Classify image files and print the best classes of each.

    An invalid file is an error, and nothing is printed. In a folder, the valid files are classified, each invalid one is
    reported on stderr, and the status is 1.
    """
    if as_json and as_csv:
        raise InputError("--json and --csv exclude each other; give one of them")
    if explain and as_csv:
        raise InputError("--explain has no column in CSV; print JSON with --json")
    if top is not None and top < 1:
        raise InputError(f"--top is {top}; expected at least 1")
    extras = Extras(coverage, None if costs is None else read_costs(costs), ask, unknown, level, explain or None)
    files = [file for path in images for file in (image_files(path) if path.is_dir() else [path])]
    keep_going = any(path.is_dir() for path in images)
    with Client(server_url(url, protocol), timeout, headers=parse_headers(header), ca_file=ca_file) as client:
        answers = _with_progress(client.stream(files, prior, extras=extras, keep_going=keep_going), len(files))
        pairs: Iterable[tuple[Path, Prediction | ServingError]] = zip(files, _check_top(answers, top), strict=True)
        if not (as_csv and keep_going):
            pairs = list(pairs)
        failed = _print_csv(pairs, top, extras != Extras()) if as_csv else _print_all(pairs, top, prior, as_json)
    if failed:
        raise ServingError(f"{failed} of {counted(len(files), 'image')} could not be classified")


def segment(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A JPEG, PNG or WebP file.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Where to write the class map, with a palette.")
    ] = None,
    overlay: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write the image with the class colours over it.")
    ] = None,
    url: Url = None,
    protocol: ProtocolOption = None,
    prior: Annotated[
        str | None, typer.Option(metavar="balanced|train|NUMBER|FILE", help="Class prior, as in `tailor predict`.")
    ] = None,
    timeout: Timeout = 60.0,
    header: Headers = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Segment an image into classes.

    Print the share of each class in its pixels, and write the class map; the pixels of the PNG are the class numbers.
    The server must serve a release of task segmentation.
    """
    for option, path in (("--out", out), ("--overlay", overlay)):
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"{option} is {str(path)!r}, in a folder that does not exist")
    if out is not None and out.suffix.lower() != ".png":
        raise InputError(f"--out is {str(out)!r}; a class map is written as PNG: expected a name that ends in .png")
    if overlay is not None and not has_image_suffix(overlay):
        raise InputError(f"--overlay is {str(overlay)!r}; expected a name that ends in {', '.join(SUFFIXES)}")
    data = read_image(image)
    with Client(server_url(url, protocol), timeout, headers=parse_headers(header), ca_file=ca_file) as client:
        [found] = client.segment([data], prior)
    if out is not None:
        found.save(out)
    if overlay is not None:
        found.overlay(decode(data)).convert("RGB").save(overlay)
    if as_json:
        print_json({"image": str(image), "version": found.version, "shares": found.shares()})
        return
    table = Table(title=f"prior {cell(prior or 'the default of the server')}, version {found.version}")
    table.add_column("class", overflow="fold")
    table.add_column("share of the pixels", justify="right")
    for name, share in found.shares().items():
        table.add_row(cell(name), f"{share:.2%}")
    Console().print(table)


def status(
    url: Url = None,
    protocol: ProtocolOption = None,
    timeout: Timeout = 10.0,
    header: Headers = None,
    ca_file: CaFile = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the server's state and the versions it serves. Status 1 when no server responds, or it does not classify."""
    with Client(server_url(url, protocol), timeout, headers=parse_headers(header), ca_file=ca_file) as client:
        server = client.status()
    if as_json:
        print_json(asdict(server))
    else:
        Console().print(status_table(server))
    if server.problem:
        raise ServingError(server.problem)


def _with_progress(answers: Iterable[Prediction | ServingError], number: int) -> Iterable[Prediction | ServingError]:
    """Yield the results with a progress bar, on a terminal and for at least BAR_FROM images."""
    console = Console(file=sys.stderr)
    if number < BAR_FROM or not console.is_terminal:
        return answers
    return track(answers, "classifying", total=number, console=console, transient=True)


def _check_top(answers: Iterable[Prediction | ServingError], top: int | None) -> Iterator[Prediction | ServingError]:
    """Yield the results; print errors on stderr. Raises InputError when a response has fewer than `top` classes."""
    for answer in answers:
        if isinstance(answer, ServingError):
            print(f"tailor: {answer}", file=sys.stderr)
        elif top is not None and top > len(answer.classes):
            raise InputError(f"--top is {top}; the server returns the best {len(answer.classes)}")
        yield answer


def _print_csv(pairs: Iterable[tuple[Path, Prediction | ServingError]], top: int | None, extras: bool) -> int:
    """Print CSV row by row; return the number of failed images. The header follows the first result, which may raise."""
    writer, failed = None, 0
    for image, answer in pairs:
        if writer is None:
            writer = csv.writer(sys.stdout, lineterminator="\n")
            writer.writerow([*CSV_COLUMNS, *(EXTRA_COLUMNS if extras else ())])
        failed += isinstance(answer, ServingError)
        writer.writerows(as_rows(image, answer, top, extras))
    return failed


def _print_all(
    pairs: Iterable[tuple[Path, Prediction | ServingError]], top: int | None, prior: str | None, as_json: bool
) -> int:
    """Print JSON or a table; return the number of failed images."""
    if as_json:
        print_json([as_mapping(image, answer, top) for image, answer in pairs])
    else:
        Console().print(prediction_table(pairs, top, prior))
    return sum(isinstance(answer, ServingError) for _, answer in pairs)


def prediction_table(
    pairs: Sequence[tuple[Path, Prediction | ServingError]], top: int | None, prior: str | None
) -> Table:
    """Table of every image's best `top` classes with their probabilities."""
    numbers = sorted({answer.version for _, answer in pairs if isinstance(answer, Prediction)})
    versions = ", ".join(map(str, numbers)) or "none"
    table = Table(title=f"prior {cell(prior or 'the default of the server')}, version {versions}")
    table.add_column("image", overflow="fold")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    extras = [text for _, answer in pairs if isinstance(answer, Prediction) for text in extras_text(answer)]
    if extras:
        table.add_column("more", overflow="fold")
    for image, answer in pairs:
        if isinstance(answer, ServingError):
            table.add_row(cell(str(image)), "not classified", "")
        else:
            for rank, (name, _, p) in enumerate(best_classes(answer, top)):
                more = [cell("\n".join(extras_text(answer)))] if extras and not rank else []
                table.add_row("" if rank else cell(str(image)), cell(name), f"{p:.4f}", *more)
        table.add_section()
    return table


def status_table(status: Status) -> Table:
    """Table of the models, their versions and their states."""
    table = Table(title=cell(f"{status.server} {status.server_version} at {status.url}"))
    table.add_column("model")
    table.add_column("versions")
    table.add_column("state")
    for model in status.models:
        state = "not loaded" if not model.versions else "answers" if status.answers else "does not answer"
        table.add_row(cell(model.name), ", ".join(map(str, model.versions)), state)
    return table

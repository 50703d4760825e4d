"""`tailor drift`: estimate the live class prior from logged logits, and act on its distance from training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from models.calibration import Calibration
from models.prior import shot_group
from models.sample_size import ADVICE
from serving.commands.options import AsJson, Debug, RepositoryOption, choose_repository, print_json
from serving.drift.calibration import calibration_from
from serving.drift.estimate import CONFIDENCE, Drift, estimate_drift, write_live_prior
from serving.drift.logged_logits import LoggedLogits, parse_time, read_logits
from serving.repository.manifest import Manifest
from serving.repository.release import read_champion, read_release
from serving.shared.errors import InputError, ServingError, install_command
from serving.shared.terminal import Console, cell, counted, print

PREDICTIONS = Path("artifacts/evaluation/predictions.parquet")
TRIGGERS = "tailor.triggers"


MethodOption = StrEnum("MethodOption", ["map", "em"])  # estimators of the class prior


def drift(
    log: Annotated[
        Path,
        typer.Argument(
            metavar="[FOLDER]", envvar="TAILOR_LOGIT_LOG", help="Folder that `tailor serve` logs logits in."
        ),
    ] = Path("artifacts/logits"),
    repository: RepositoryOption = None,
    version: Annotated[int | None, typer.Option(min=1, help="Release to compare; by default the champion.")] = None,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Start: 24h (ago), 7d, or 2026-11-24T10:00; by default no bound.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="End, in the same form; by default now.")] = None,
    method: Annotated[
        MethodOption, typer.Option(help="map is regularised towards the training prior; em is not.")
    ] = MethodOption.map,
    pseudo_samples: Annotated[
        float | None, typer.Option(help="With map: weight of the training prior in samples; classes / 10 if not given.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"Test predictions of this release for the calibration; {PREDICTIONS} if they are of this release.",
        ),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Confidence level of the intervals, between 0 and 1.")] = CONFIDENCE,
    resamples: Annotated[int, typer.Option(min=2, help="Bootstrap resamples for the intervals.")] = 200,
    samples: Annotated[int, typer.Option(min=1, help="Largest number of images used, a random sample.")] = 10_000,
    min_images: Annotated[int, typer.Option(min=1, help="Smallest number of images required.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random draws.")] = 0,
    top: Annotated[int, typer.Option(min=0, help="Number of most shifted classes shown.")] = 10,
    write: Annotated[
        bool, typer.Option("--write", help="Write the estimate as the prior `live`, used from the next request on.")
    ] = False,
    fail_above: Annotated[
        float | None, typer.Option(help="Exit with status 1 when the whole interval of the distance is above this.")
    ] = None,
    retrain_above: Annotated[
        float | None, typer.Option(help="Start a retraining when the whole interval of the distance is above this.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Estimate the class prior of live images, without labels.

    Compares it with the training prior. Assumes label shift: only the class shares changed, not the images of a class.
    The distance is the total variation: the share of images whose class would have to change.
    """
    for option, threshold in (("--fail-above", fail_above), ("--retrain-above", retrain_above)):
        if threshold is not None and not 0 <= threshold < 1:
            raise InputError(f"{option} is {threshold:g}; expected a distance from 0 to below 1")
    if samples < min_images:
        raise InputError(
            f"--samples is {samples} and --min-images {min_images}; expected at least as many samples as images"
        )
    trigger = None if retrain_above is None else load_retrain_trigger()
    root = choose_repository(repository)
    release = read_champion(root) if version is None else read_release(root, version, hashes=False)
    manifest = release.manifest
    if manifest.segmentation:
        raise ServingError(
            f"{root}: is of task segmentation, whose server logs no logits; `tailor drift` is for classification"
        )
    times = {"since": since, "until": until}
    bounds = {name: parse_time(text, f"--{name}") for name, text in times.items() if text is not None}
    logged = read_logits(log, manifest, **bounds, most=samples, seed=seed)
    for name, reason in logged.skipped.items():
        print(f"tailor: {log / name}: {reason}; left out", file=sys.stderr)
    _check_enough(logged, log, manifest, min_images)
    calibrated, calibration_facts = _calibration(calibration, manifest, write)
    estimate = estimate_drift(
        logged.logits, manifest.counts, calibrated, method=method.value, pseudo_samples=pseudo_samples,
        confidence=confidence, resamples=resamples, seed=seed,
    )  # fmt: skip
    facts = _facts(estimate, logged, manifest, calibration_facts)
    written = write_live_prior(root, manifest, estimate.prior, facts) if write else None
    reason = f"distance of the live class prior {_distance_text(estimate)} is above {retrain_above}"
    retrains = trigger is not None and estimate.exceeds(retrain_above or 0.0)
    if as_json:
        groups = {name: vars(share) for name, share in estimate.groups.items()}
        facts |= {"groups": groups, "classes": _classes(estimate, manifest), "skipped": logged.skipped}
        print_json({**facts, "written": written and str(written), "retrain": retrains})
    else:
        _print_estimate(estimate, facts, manifest, top, written)
    if trigger is not None and retrains:
        print(f"tailor: starting a retraining: {reason}", file=sys.stderr)
        print(f"tailor: {trigger(reason) or 'retraining was started'}", file=sys.stderr)
    if fail_above is not None and estimate.exceeds(fail_above):
        distance = _distance_text(estimate)
        raise ServingError(f"the distance of the live class prior, {distance}, is above --fail-above {fail_above:g}")


def load_retrain_trigger() -> Callable[[str], Any]:
    """Load the function that starts a retraining, called with the reason: entry point `retrain` of tailor.triggers.

    The package `pipeline` provides it: serving does not import pipeline. Raises ServingError where none is installed.
    """
    hint = f"{install_command('pipeline')}, or leave --retrain-above out"
    entry = next(iter(entry_points(group=TRIGGERS, name="retrain")), None)
    if entry is None:
        raise ServingError(f"--retrain-above: no package that can retrain is installed; {hint}")
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise ServingError(f"--retrain-above: {entry.value} cannot be used ({error}); {hint}") from None


def _check_enough(logged: LoggedLogits, log: Path, manifest: Manifest, minimum: int) -> None:
    if len(logged.logits) >= minimum:
        return
    others = ", ".join(f"{number} of version {version}" for version, number in sorted(logged.others.items()))
    raise ServingError(
        f"{log}: holds {counted(logged.in_window, 'image')} of version {manifest.version} in this time; expected at least "
        f"{minimum}{f' (there are {others})' if others else ''}; log for longer, or a larger --log-share"
    )


def _calibration(
    file: Path | None, manifest: Manifest, write: bool
) -> tuple[Calibration | None, dict[str, Any] | None]:
    """Return the calibration and its facts for the output; (None, None) without test predictions of this release.

    write: whether a live prior will be written; then raises ServingError without a calibration, or with one from too
    few test images.
    """
    path = file or PREDICTIONS
    try:
        if file is None and not path.is_file():
            raise ServingError(f"{path}: no such file")
        calibration = calibration_from(path, manifest)
    except ServingError as error:
        if file is not None:
            raise
        if write:
            raise ServingError(
                f"{error}; no live prior is written without a calibration: give --calibration FILE, the predictions.parquet "
                f"that evaluation wrote for version {manifest.version}"
            ) from None
        print(f"tailor: {error}; not calibrated", file=sys.stderr)
        return None, None
    facts: dict[str, Any] = {"file": str(path), "temperature": calibration.temperature}
    if (size := calibration.size) is not None:
        facts |= {"test_images": size.images, "too_few_test_images": size.too_few}
        if size.too_few and write:
            raise ServingError(
                f"{path}: no live prior is written, because its calibration rests on {size}; {ADVICE}, then train, "
                "evaluate and publish again"
            )
        if size.too_few:
            print(f"tailor: warning: {path}: the calibration rests on {size}", file=sys.stderr)
    return calibration, facts


def _facts(
    estimate: Drift, logged: LoggedLogits, manifest: Manifest, calibration: dict[str, Any] | None
) -> dict[str, Any]:
    first, last = (datetime.fromtimestamp(int(edge(logged.times)) / 1000, UTC) for edge in (min, max))
    return {
        "version": manifest.version,
        "images": estimate.images,
        "logged": logged.in_window,
        "first": first.isoformat(timespec="seconds"),
        "last": last.isoformat(timespec="seconds"),
        "method": estimate.method,
        "calibration": calibration,
        "confidence": estimate.confidence,
        "distance": vars(estimate.distance),
    }


def _classes(estimate: Drift, manifest: Manifest) -> list[dict[str, Any]]:
    columns = ("training", "prior", "low", "high", "em", "map")
    return [
        {"class": name, "count": manifest.counts[c], **{key: float(getattr(estimate, key)[c]) for key in columns}}
        for c, name in enumerate(manifest.classes)
    ]


def _distance_text(estimate: Drift) -> str:
    distance = estimate.distance
    return f"{distance.value:.3f} ({estimate.confidence:.0%} interval {distance.low:.3f} to {distance.high:.3f})"


def _print_estimate(estimate: Drift, facts: dict[str, Any], manifest: Manifest, top: int, written: Path | None) -> None:
    title = f"version {manifest.version}, {facts['first']} to {facts['last']}"
    Console().print(drift_table(estimate, manifest, top, title))
    calibration = facts["calibration"]
    calibrated = f"calibrated, temperature {calibration['temperature']:.3g}" if calibration else "not calibrated"
    images = f"{estimate.images:,} of " if facts["logged"] > estimate.images else ""
    images += counted(max(facts["logged"], estimate.images), "image")
    print(f"distance from the training prior {_distance_text(estimate)}")
    print(f"{images}, {estimate.method.upper()}, {calibrated}")
    if written:
        print(f"written: {written}; `tailor predict --prior live` uses it")


def drift_table(estimate: Drift, manifest: Manifest, top: int, title: str) -> Table:
    """Table of the live class prior: a row per group of classes, then the `top` most shifted classes."""
    table = Table(title=f"class prior of {cell(title)}")
    table.add_column("classes", overflow="fold")
    for name in ("training", "live", f"{estimate.confidence:.0%} interval", "times"):
        table.add_column(name, justify="right")

    def add(name: str, training: float, live: float, low: float, high: float) -> None:
        times = f"{live / training:.2f}" if training > 1e-6 else ""
        table.add_row(cell(name), f"{training:.3f}", f"{live:.3f}", f"{low:.3f} to {high:.3f}", times)

    groups = [shot_group(count) for count in manifest.counts]
    for group, share in estimate.groups.items():
        members = [p for p, of in zip(estimate.training, groups, strict=True) if of == group]
        add(f"{group} ({len(members)})", sum(members), share.value, share.low, share.high)
    table.add_section()
    for c in estimate.most_shifted(top):
        add(manifest.classes[c], estimate.training[c], estimate.prior[c], estimate.low[c], estimate.high[c])
    return table

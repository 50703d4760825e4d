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
from serving.shared.errors import InputError, ServingError
from serving.shared.terminal import Console, cell, counted, print

PREDICTIONS = Path("artifacts/evaluation/predictions.parquet")
TRIGGERS = "tailor.triggers"


class MethodOption(StrEnum):
    """Estimators of the class prior."""

    map = "map"
    em = "em"


def drift(
    log: Annotated[
        Path,
        typer.Argument(
            metavar="[FOLDER]", envvar="TAILOR_LOGIT_LOG", help="Folder that `tailor serve` logs logits in."
        ),
    ] = Path("artifacts/logits"),
    repository: RepositoryOption = None,
    version: Annotated[int | None, typer.Option(min=1, help="Release to look at; the champion if not given.")] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="From when on: 24h, 7d ago, or 2026-11-24T10:00; all if not given."),
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME", help="Until when, likewise; now if not given.")] = None,
    method: Annotated[
        MethodOption, typer.Option(help="map holds on to the training prior where data are few; em does not.")
    ] = MethodOption.map,
    pseudo_samples: Annotated[
        float | None, typer.Option(help="With map: how many samples the training prior counts for; classes / 10.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=f"Test answers of this release to calibrate by; {PREDICTIONS} if it is there and of this release.",
        ),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the intervals, between 0 and 1.")] = CONFIDENCE,
    resamples: Annotated[int, typer.Option(min=2, help="Bootstrap resamples behind the intervals.")] = 200,
    samples: Annotated[int, typer.Option(min=1, help="Most images to estimate from, drawn from more.")] = 10_000,
    min_images: Annotated[int, typer.Option(min=1, help="Fewest images to estimate from.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    top: Annotated[int, typer.Option(min=0, help="Most shifted classes to show.")] = 10,
    write: Annotated[
        bool, typer.Option("--write", help="Make it the prior that requests name `live`, from the next request on.")
    ] = False,
    fail_above: Annotated[
        float | None, typer.Option(help="Status 1 when the whole interval of the distance lies above this.")
    ] = None,
    retrain_above: Annotated[
        float | None, typer.Option(help="Start a retraining when the whole interval of the distance lies above this.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Estimate the class prior of live images, without labels.

    It is compared with training. Holds where the classes look as in training and only their shares changed. The
    distance is the total variation: the share of images whose class would have to change.
    """
    for option, threshold in (("--fail-above", fail_above), ("--retrain-above", retrain_above)):
        if threshold is not None and not 0 <= threshold < 1:
            raise InputError(f"{option} is {threshold:g}; expected a distance from 0 to below 1")
    if samples < min_images:
        raise InputError(
            f"--samples is {samples} and --min-images {min_images}; expected at least as many samples as images"
        )
    trigger = None if retrain_above is None else retraining()
    root = choose_repository(repository)
    manifest = _manifest(root, version)
    start, end = (_moment(text, name) for text, name in ((since, "--since"), (until, "--until")))
    bounds = {name: value for name, value in (("since", start), ("until", end)) if value is not None}
    logged = read_logits(log, manifest, **bounds, most=samples, seed=seed)
    for name, reason in logged.skipped.items():
        print(f"tailor: {log / name}: {reason}; left out", file=sys.stderr)
    _check_enough(logged, log, manifest, min_images)
    calibrated, how = _calibration(calibration, manifest, write)
    found = estimate_drift(
        logged.logits,
        manifest.counts,
        calibrated,
        method=method.value,
        pseudo_samples=pseudo_samples,
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )
    facts = _facts(found, logged, manifest, how)
    written = write_live_prior(root, manifest, found.prior, facts) if write else None
    reason = f"distance of the live class prior {_bounded(found)} is above {retrain_above}"
    retrains = trigger is not None and found.exceeds(retrain_above or 0.0)
    if as_json:
        print_json(
            {
                **facts,
                "groups": {name: vars(share) for name, share in found.groups.items()},
                "classes": _classes(found, manifest),
                "skipped": logged.skipped,
                "written": written and str(written),
                "retrain": retrains,
            }
        )
    else:
        _show(found, facts, manifest, top, written)
    if trigger is not None and retrains:
        print(f"tailor: retraining, as the {reason}", file=sys.stderr)
        print(f"tailor: {trigger(reason) or 'retraining was started'}", file=sys.stderr)
    if fail_above is not None and found.exceeds(fail_above):
        raise ServingError(
            f"the distance of the live class prior, {_bounded(found)}, is above --fail-above {fail_above:g}"
        )


def retraining() -> Callable[[str], Any]:
    """Load the function that starts a retraining, called with the reason: entry point `retrain` of tailor.triggers.

    The package `pipeline` provides it: serving does not import pipeline. Raises ServingError where none is installed.
    """
    hint = "pip install 'tailor[pipeline]', or leave --retrain-above out"
    entry = next(iter(entry_points(group=TRIGGERS, name="retrain")), None)
    if entry is None:
        raise ServingError(f"--retrain-above: nothing here can retrain; {hint}")
    try:
        return entry.load()
    except (ImportError, AttributeError) as error:
        raise ServingError(f"--retrain-above: {entry.value} cannot be used ({error}); {hint}") from None


def _manifest(repository: Path, version: int | None) -> Manifest:
    if version is None:
        return read_champion(repository).manifest
    return read_release(repository, version, hashes=False).manifest


def _moment(text: str | None, option: str) -> float | None:
    return None if text is None else parse_time(text, option)


def _check_enough(logged: LoggedLogits, log: Path, manifest: Manifest, wanted: int) -> None:
    if len(logged.logits) >= wanted:
        return
    others = ", ".join(f"{number} of version {version}" for version, number in sorted(logged.others.items()))
    raise ServingError(
        f"{log}: holds {counted(logged.found, 'image')} of version {manifest.version} in this time; expected at least {wanted}"
        f"{f' (there are {others})' if others else ''}; log for longer, or a larger --log-share"
    )


def _calibration(
    given: Path | None, manifest: Manifest, write: bool
) -> tuple[Calibration | None, dict[str, Any] | None]:
    """Return the calibration and its facts for the output; (None, None) without test predictions of this release.

    write: whether a live prior will be written; then raises ServingError without a calibration, or with one from too
    few test images.
    """
    path = given or PREDICTIONS
    try:
        if given is None and not path.is_file():
            raise ServingError(f"{path}: no such file")
        found = calibration_from(path, manifest)
    except ServingError as error:
        if given is not None:
            raise
        if write:
            raise ServingError(
                f"{error}; no live prior is written without a calibration: give --calibration FILE, the predictions.parquet "
                f"that evaluation wrote for version {manifest.version}"
            ) from None
        print(f"tailor: {error}; not calibrated", file=sys.stderr)
        return None, None
    told: dict[str, Any] = {"file": str(path), "temperature": found.temperature}
    if found.size is not None:
        told |= {"test_images": found.size.images, "too_few_test_images": found.size.too_few}
        if found.size.too_few and write:
            raise ServingError(
                f"{path}: no live prior is written, because its calibration rests on {found.size}; {ADVICE}, then train, "
                "evaluate and publish again"
            )
        if found.size.too_few:
            print(f"tailor: warning: {path}: the calibration rests on {found.size}", file=sys.stderr)
    return found, told


def _facts(found: Drift, logged: LoggedLogits, manifest: Manifest, how: dict[str, Any] | None) -> dict[str, Any]:
    first, last = (datetime.fromtimestamp(int(edge(logged.times)) / 1000, UTC) for edge in (min, max))
    return {
        "version": manifest.version,
        "images": found.images,
        "logged": logged.found,
        "first": first.isoformat(timespec="seconds"),
        "last": last.isoformat(timespec="seconds"),
        "method": found.method,
        "calibration": how,
        "confidence": found.confidence,
        "distance": vars(found.distance),
    }


def _classes(found: Drift, manifest: Manifest) -> list[dict[str, Any]]:
    columns = ("training", "prior", "low", "high", "em", "map")
    return [
        {"class": name, "count": manifest.counts[c], **{key: float(getattr(found, key)[c]) for key in columns}}
        for c, name in enumerate(manifest.classes)
    ]


def _bounded(found: Drift) -> str:
    distance = found.distance
    return f"{distance.value:.3f} ({found.confidence:.0%} interval {distance.low:.3f} to {distance.high:.3f})"


def _show(found: Drift, facts: dict[str, Any], manifest: Manifest, top: int, written: Path | None) -> None:
    console = Console()
    console.print(drift_table(found, manifest, top, f"version {manifest.version}, {facts['first']} to {facts['last']}"))
    how = facts["calibration"]
    told = f"calibrated, temperature {how['temperature']:.3g}" if how else "not calibrated"
    drawn = f"{found.images:,} of " if facts["logged"] > found.images else ""
    drawn += counted(max(facts["logged"], found.images), "image")
    lines = [
        f"distance from the training prior {_bounded(found)}",
        f"{drawn}, {found.method.upper()}, {told}",
    ]
    if written:
        lines.append(f"written: {written}; `tailor predict --prior live` uses it")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def drift_table(found: Drift, manifest: Manifest, top: int, title: str) -> Table:
    """Table of the live class prior: a row per group of classes, then the `top` most shifted classes."""
    table = Table(title=f"class prior of {cell(title)}")
    table.add_column("classes", overflow="fold")
    for name in ("training", "live", f"{found.confidence:.0%} interval", "times"):
        table.add_column(name, justify="right")

    def add(name: str, training: float, live: float, low: float, high: float) -> None:
        times = f"{live / training:.2f}" if training > 1e-6 else ""
        table.add_row(cell(name), f"{training:.3f}", f"{live:.3f}", f"{low:.3f} to {high:.3f}", times)

    groups = [shot_group(count) for count in manifest.counts]
    for group, share in found.groups.items():
        members = [p for p, of in zip(found.training, groups, strict=True) if of == group]
        add(f"{group} ({len(members)})", sum(members), share.value, share.low, share.high)
    table.add_section()
    for c in found.most_shifted(top):
        add(manifest.classes[c], found.training[c], found.prior[c], found.low[c], found.high[c])
    return table

"""Health checks of `tailor doctor`: installed packages, params, servers, champion, last run, ingest, disk space."""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pipeline.doctor.prefect import Finding, prefect_findings
from pipeline.params import load_params
from pipeline.shared.artifacts import INGEST_STATE, QUARANTINE
from pipeline.shared.errors import TailorError, install_command
from serving.client.sync_client import Client
from serving.promotion.history import read_history
from serving.server.running import find_running
from serving.shared.errors import ServingError
from serving.shared.names import ADMIN_KEY_VARIABLE
from serving.shared.terminal import counted
from serving.shared.version import TAILOR_VERSION

LAST_RUN = Path("artifacts/retrain/last.json")
GIB = 1024**3
DAY = 86400  # seconds
CLOCK_REMEDY = "the clock was set back; correct it"
MIN_FREE = 1.0  # GiB; with less a stage or a promotion is likely to fail
# Optional packages, and what needs each of them.
PACKAGES = {
    "torch": "training",
    "dvc": "the stages",
    "onnxruntime": "the export",
    "prefect": "the schedule",
    "tritonclient": "requests",
    "nvidia-pytriton": "the server",
}
INSTALL = {
    "onnxruntime": f"{install_command('export', 'cpu')}; `gpu` instead of `cpu` for a GPU",
    "nvidia-pytriton": f"{install_command('serve')}, or use the server's container",
}


@dataclass(frozen=True)
class Limits:
    """Limits for warnings: hours since the last run, days since the promotion, free GiB on a disk."""

    run_hours: float = 48.0
    champion_days: float = 30.0
    disk_gib: float = 5.0


def examine(params_file: Path, repository: Path, url: str | None = None, limits: Limits | None = None) -> list[Finding]:
    """Run every check and return the findings; an error of a check becomes a finding and does not stop the others.

    url: the server to check, http:// or grpc://; None checks this user's servers on this machine that serve the
    repository.
    """
    limits = limits or Limits()
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", _check_packages),
        ("params", lambda: _check_params(params_file)),
        ("server", lambda: _check_servers(repository, url)),
        ("champion", lambda: _check_champion(repository, limits)),
        ("prefect", prefect_findings),
        ("last run", lambda: _check_last_run(limits)),
        ("ingest", _check_ingest),
        ("disk", lambda: _check_disk(repository, limits)),
    ]
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings += check()
        except (TailorError, OSError) as error:
            findings.append(Finding(name, "failing", " ".join(str(error).split())))
    return findings


def _check_packages() -> Iterator[Finding]:
    installed, missing = [f"Python {platform.python_version()}"], []
    for name in PACKAGES:
        try:
            installed.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    yield Finding("versions", "ok", f"Tailor {TAILOR_VERSION}, {', '.join(installed)}")
    for name in missing:
        remedy = INSTALL.get(name, install_command("pipeline"))
        yield Finding("versions", "warning", f"{name} is not installed, which {PACKAGES[name]} needs", remedy)


def _check_params(path: Path) -> Iterator[Finding]:
    load_params(path)
    yield Finding("params", "ok", f"{path} is valid")


def _check_servers(repository: Path, url: str | None) -> Iterator[Finding]:
    urls = [url] if url else [server.grpc_url for server in find_running(repository)]
    if not urls:
        remedy = f"tailor serve --repository {repository}; or name one elsewhere with --url"
        yield Finding("server", "warning", f"no server of this user runs on {repository}", remedy)
    for address in urls:
        try:
            with Client(address, timeout=10.0) as client:
                status = client.status()
        except ServingError as error:
            yield Finding(
                "server", "failing", str(error), f"start it, and set {ADMIN_KEY_VARIABLE} if it needs the key"
            )
            continue
        models = ", ".join(f"{model.name} {list(model.versions)}" for model in status.models)
        if status.problem:
            yield Finding("server", "failing", f"{address}: {status.problem}", "tailor status shows more; see its log")
        else:
            yield Finding("server", "ok", f"{address} responds ({status.server} {status.server_version}; {models})")


def _check_champion(repository: Path, limits: Limits) -> Iterator[Finding]:
    if not repository.is_dir():
        yield Finding("champion", "warning", f"{repository}: no repository yet", "dvc repro, or tailor retrain")
        return
    champion = next(entry for entry in read_history(repository).versions if entry.state.state == "champion")
    age = time.time() - (champion.promoted or champion.state.published)
    text = f"version {champion.state.version}, {'promoted' if champion.promoted else 'published'}"
    if age < 0:
        yield Finding("champion", "warning", f"{text} in the future", CLOCK_REMEDY)
    elif age > limits.champion_days * DAY:
        remedy = "tailor retrain; and see why no challenger was better: tailor history"
        yield Finding("champion", "warning", f"{text} {age / DAY:.0f} days ago, over {limits.champion_days:g}", remedy)
    else:
        yield Finding("champion", "ok", f"{text} {_ago(age)}")


def _check_last_run(limits: Limits) -> Iterator[Finding]:
    try:
        content = json.loads(LAST_RUN.read_text(encoding="utf-8"))
        begun, outcome = datetime.fromisoformat(content["begun"]), content.get("outcome") or {}
        ending, message = str(outcome.get("ending", "unknown")), str(outcome.get("message", ""))
    except FileNotFoundError:
        yield Finding("last run", "warning", "no retraining has run here yet", "tailor retrain, or tailor schedule")
        return
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = f"remove {LAST_RUN}; the next run writes it"
        yield Finding("last run", "failing", f"{LAST_RUN}: damaged ({error})", remedy)
        return
    age = (datetime.now(UTC) - begun.astimezone(UTC)).total_seconds()
    text = f"{ending}, started {_ago(age)}{': ' if message else ''}{message}"
    if ending == "failed":
        yield Finding("last run", "failing", text, "correct what the message names, then tailor retrain")
    elif age < 0:
        yield Finding("last run", "warning", f"{ending}, started in the future", CLOCK_REMEDY)
    elif age > limits.run_hours * 3600:
        yield Finding(
            "last run", "warning", f"{text}; over {limits.run_hours:g} h", "tailor schedule, or tailor retrain"
        )
    else:
        yield Finding("last run", "ok", text)


def _check_ingest() -> Iterator[Finding]:
    if (INGEST_STATE / "round").is_dir():
        yield Finding("ingest", "warning", "a run was killed or is in progress", "tailor ingest completes it")
    refused = sorted(QUARANTINE.glob("refused-*"))
    rounds = sorted(QUARANTINE.glob("*/rows.csv"))
    if refused:
        message = f"{counted(len(refused), 'whole drop', 'were')} refused"
        yield Finding("ingest", "warning", message, f"see {refused[-1]}, and remove it")
    elif rounds:
        yield Finding("ingest", "ok", f"{counted(len(rounds), 'round')} quarantined bad rows in {QUARANTINE}")
    else:
        yield Finding("ingest", "ok", "no bad rows in quarantine")


def _check_disk(repository: Path, limits: Limits) -> Iterator[Finding]:
    paths = {path.stat().st_dev: path for path in (repository, Path.cwd()) if path.exists()}
    for path in paths.values():
        free = shutil.disk_usage(path).free / GIB
        text = f"{free:.1f} GiB free at {path}"
        if free < MIN_FREE:
            yield Finding("disk", "failing", text, "dvc gc --workspace, or remove what is no longer needed")
        elif free < limits.disk_gib:
            yield Finding("disk", "warning", f"{text}, under {limits.disk_gib:g}", "dvc gc --workspace frees old outs")
        else:
            yield Finding("disk", "ok", text)


def _ago(seconds: float) -> str:
    for unit, size in (("days", DAY), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} seconds ago"

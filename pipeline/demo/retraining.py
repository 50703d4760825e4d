"""`make retrain-demo`: two rounds of retraining on the embedded data with the real commands, one promoted, one refused.

The project is created in build/retrain-demo and remains for inspection. In the second round the drop folder holds real
images with wrong labels: the rows are well-formed, so ingest accepts them, and the gate measures their effect.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet

from pipeline.preparation.project import create_project
from pipeline.shared.artifacts import write_file
from pipeline.shared.errors import StageError
from pipeline.sources.digits import DigitsSource
from serving.shared.terminal import print

ROOT = Path(__file__).parents[2]
FOLDER = Path("build/retrain-demo")
RECIPE = """
teacher: {epochs: 12, schedule: {warmup_epochs: 0}}
student: {epochs: 12, schedule: {warmup_epochs: 0}}
ingest: {settle_seconds: 0}
"""
WRONG_IMAGES = 400  # images with wrong labels


def run() -> None:
    """Run both rounds. Raises StageError if a command fails or the repository does not hold version 1 only."""
    start = time.monotonic()
    project = _make_project()
    _print_heading("round 1: no champion yet; the first model must reach gate.floor")
    _run_command(project, "tailor", "retrain", "--because", "the first model")
    with _serve(project) as (_, grpc, *_):
        image = _sample_image(project)
        _run_command(project, "tailor", "predict", image, "--url", grpc)
        _print_heading(
            f"round 2: {_write_wrong_images(project)} new images in data/drop, each with the label of the next digit"
        )
        _run_command(project, "tailor", "retrain", "--because", "a drop of new images")
        _print_heading("the server still serves version 1: its predictions are unchanged")
        _run_command(project, "tailor", "predict", image, "--url", grpc)
    _run_command(project, "tailor", "versions", "--repository", "releases")
    _print_heading("no new images: the next run ends early")
    _run_command(project, "tailor", "retrain")
    _print_heading("both rounds are DVC experiments")
    _run_command(project, "tailor", "experiments")
    versions = sorted(path.name for path in (project / "releases/classifier").iterdir() if path.name.isdecimal())
    if versions != ["1"]:
        raise StageError(f"{project}/releases has the versions {', '.join(versions)}; expected only version 1")
    _print_heading(f"one promoted, one refused, in {time.monotonic() - start:.0f} s; the project is in {project}")


def _make_project() -> Path:
    """Create a project with the default recipe and shorter training."""
    project = FOLDER.absolute()
    shutil.rmtree(project, ignore_errors=True)
    create_project(project)
    write_file(project / "short.yaml", RECIPE)
    author = ("-c", "user.name=tailor", "-c", "user.email=tailor@localhost")
    for command in (
        ("tailor", "recipe", "short.yaml"),
        ("git", "add", "-A"),
        ("git", *author, "commit", "--quiet", "-m", "demo project"),
    ):
        _run_command(project, *command)
    return project


def _write_wrong_images(project: Path) -> int:
    """Write images that are in no split into the drop folder, each with a wrong label. Returns their number."""
    source = DigitsSource()
    used: set[str] = set()
    for split in ("train", "validation", "test"):
        table = pyarrow.parquet.read_table(project / f"data/split/{split}.parquet", columns=["sample_id"])
        used |= {name.rpartition("/")[2] for name in table.column("sample_id").to_pylist()}
    unused = [row for row in source.rows if row.reference not in used][:WRONG_IMAGES]
    for row in unused:
        wrong_class = source.classes[(row.label + 1) % len(source.classes)]
        write_file(project / "data/drop" / wrong_class / f"{row.reference}.png", source.read(row.reference))
    return len(unused)


def _sample_image(project: Path) -> str:
    samples = sorted((project / "artifacts/evaluation/samples").glob("*.png"))
    return str(samples[0].relative_to(project))


@contextlib.contextmanager
def _serve(project: Path) -> Iterator[list[str]]:
    """Run `tailor serve` on the releases; gives the addresses that the server printed."""
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    command = _resolve(["tailor", "serve", "--repository", "releases", "--quiet", *ports])
    process = subprocess.Popen(
        command, cwd=project, env=_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    try:
        ready = next((line for line in process.stdout if line.startswith("ready ")), None)
        if ready is None:
            raise StageError(f"tailor serve ended with status {process.wait()}")
        print(ready, end="", flush=True)
        yield ready.split()[1:]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()


def _run_command(project: Path, *command: str) -> None:
    """Print a command and run it. Raises StageError if it fails."""
    if command[0] == "tailor" or command[:2] == ("dvc", "exp"):
        print(f"\n$ {' '.join(command)}", flush=True)
    result = subprocess.run(_resolve(command), cwd=project, env=_environment(), stdin=subprocess.DEVNULL, check=False)
    if result.returncode:
        raise StageError(f"{' '.join(command)} ended with status {result.returncode}")


def _resolve(command: tuple[str, ...] | list[str]) -> list[str]:
    return [shutil.which(command[0], path=_environment()["PATH"]) or command[0], *command[1:]]


def _environment() -> dict[str, str]:
    first = {"PATH": Path(sys.executable).parent, "PYTHONPATH": ROOT}  # commands use this interpreter and source tree
    values = {name: [str(path), *filter(None, [os.environ.get(name)])] for name, path in first.items()}
    return os.environ | {name: os.pathsep.join(paths) for name, paths in values.items()}


def _print_heading(text: str) -> None:
    print(f"\n== {text}", flush=True)


def main() -> int:
    """Run the demo; returns the exit code."""
    try:
        run()
    except (StageError, OSError) as error:
        print(f"retrain-demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("retrain-demo: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

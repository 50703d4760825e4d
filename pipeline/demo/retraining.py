"""`make retrain-demo`: two rounds of retraining on the embedded data with the real commands, one promoted, one refused.

The project is created in build/retrain-demo and remains for inspection. In the second round the drop folder holds real
images with wrong labels: the rows are well-formed, so ingest accepts them, and the gate measures their effect.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
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
WRONG = 400  # images with wrong labels


def run() -> None:
    """Run both rounds. Raises StageError if a command fails or the repository does not hold version 1 only."""
    begun = time.monotonic()
    project = _make_project()
    _say("round 1: no champion yet, so the first model has to reach the floor (gate.floor)")
    _command(project, "tailor", "retrain", "--because", "the first model")
    with _serving(project) as addresses:
        grpc = addresses[1]
        image = _some_image(project)
        _command(project, "tailor", "predict", image, "--url", grpc)
        _say(f"round 2: {_fill_drop(project)} new images arrive in data/drop, each under the next digit's name")
        _command(project, "tailor", "retrain", "--because", "a drop of new images")
        _say("the server never heard of it: version 1 answers as before")
        _command(project, "tailor", "predict", image, "--url", grpc)
    _command(project, "tailor", "versions", "--repository", "releases")
    _say("nothing new since: the next run ends early")
    _command(project, "tailor", "retrain")
    _say("both rounds are DVC experiments")
    _command(project, "tailor", "experiments")
    versions = sorted(path.name for path in (project / "releases/classifier").iterdir() if path.name.isdecimal())
    if versions != ["1"]:
        raise StageError(f"{project}/releases holds the versions {', '.join(versions)}; expected 1 alone")
    _say(f"one promoted, one refused, in {time.monotonic() - begun:.0f} s; look around in {project}")


def _make_project() -> Path:
    """Create a project with the default recipe and shorter training."""
    project = FOLDER.absolute()
    shutil.rmtree(project, ignore_errors=True)
    create_project(project)
    write_file(project / "short.yaml", RECIPE)
    who = ("-c", "user.name=tailor", "-c", "user.email=tailor@localhost")
    for command in (
        ("tailor", "recipe", "short.yaml"),
        ("git", "add", "-A"),
        ("git", *who, "commit", "--quiet", "-m", "the project of the demo"),
    ):
        _command(project, *command)
    return project


def _fill_drop(project: Path) -> int:
    """Write images that are in no split into the drop folder, each with a wrong label. Returns their number."""
    source = DigitsSource()
    used: set[str] = set()
    for split in ("train", "validation", "test"):
        table = pyarrow.parquet.read_table(project / f"data/split/{split}.parquet", columns=["sample_id"])
        used |= {name.rpartition("/")[2] for name in table.column("sample_id").to_pylist()}
    fresh = [row for row in source.rows if row.reference not in used][:WRONG]
    for row in fresh:
        wrong = source.classes[(row.label + 1) % len(source.classes)]
        write_file(project / "data/drop" / wrong / f"{row.reference}.png", source.read(row.reference))
    return len(fresh)


def _some_image(project: Path) -> str:
    samples = sorted((project / "artifacts/evaluation/samples").glob("*.png"))
    return str(samples[0].relative_to(project))


class _serving:
    """Context manager that runs `tailor serve` on the releases; gives the addresses that the server printed."""

    def __init__(self, project: Path) -> None:
        ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
        self._process = subprocess.Popen(
            _whole(["tailor", "serve", "--repository", "releases", "--quiet", *ports]),
            cwd=project,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> list[str]:
        for line in self._process.stdout:
            if line.startswith("ready "):
                print(line, end="", flush=True)
                return line.split()[1:]
        raise StageError(f"tailor serve ended with status {self._process.wait()}")

    def __exit__(self, *_error: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate()


def _command(project: Path, *command: str) -> None:
    """Print a command and run it. Raises StageError if it fails."""
    if command[0] == "tailor" or command[:2] == ("dvc", "exp"):
        print(f"\n$ {' '.join(command)}", flush=True)
    done = subprocess.run(_whole(command), cwd=project, env=_environment(), stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise StageError(f"{' '.join(command)} ended with status {done.returncode}")


def _whole(command: tuple[str, ...] | list[str]) -> list[str]:
    return [shutil.which(command[0], path=_environment()["PATH"]) or command[0], *command[1:]]


def _environment() -> dict[str, str]:
    first = {"PATH": Path(sys.executable).parent, "PYTHONPATH": ROOT}  # commands use this interpreter and source tree
    values = {name: [str(path), *filter(None, [os.environ.get(name)])] for name, path in first.items()}
    return os.environ | {name: os.pathsep.join(paths) for name, paths in values.items()}


def _say(line: str) -> None:
    print(f"\n== {line}", flush=True)


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

"""Command: a training stage as a Ray Train job, for teams that have Ray; the same stage that `torchrun` starts.

Ray places the workers, joins them to a process group and starts them again when one is lost; each then runs the stage, and
goes on where its checkpoint was. Ray is asked for nothing else: checkpoints, metrics and artifacts are the stage's own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pipeline
from pipeline.artifacts import TEACHER
from pipeline.errors import ParamsError, StageError
from pipeline.params import PARAMS_FILE, load_params
from pipeline.stage import end_with_dvc, explain
from serving.terminal import print

STAGES = ("teacher", "student")
EPILOG = """\
examples:
  python -m pipeline.ray_train student --workers 2           two processes here; each a GPU, where there are any
  RAY_ADDRESS=ray-head:6379 python -m pipeline.ray_train student --workers 16
  TAILOR_LAUNCH='python -m pipeline.ray_train --workers 8' dvc repro
The project's folder must be on a disk that all hosts share, at the same path: docs/many-machines.md.
"""


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code, as the stage itself does."""
    parser = argparse.ArgumentParser(
        prog="python -m pipeline.ray_train",
        description="Run a training stage on the workers of a Ray cluster, or on a small one of its own on this machine.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", nargs="?", choices=STAGES)
    parser.add_argument("-m", dest="module", metavar="pipeline.STAGE", help="the stage, as dvc.yaml names it")
    parser.add_argument("--workers", type=int, default=1, help="processes that share a batch (default: %(default)s)")
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS"), help="a running cluster (RAY_ADDRESS)")
    parser.add_argument("--cpus", type=int, default=1, help="CPUs a worker (default: %(default)s)")
    parser.add_argument("--restarts", type=int, default=0, help="how often lost workers are started again (default: 0)")
    parser.add_argument("--params", type=Path, default=PARAMS_FILE, help="the recipe (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error, and Ray's log")
    options = parser.parse_args(arguments)
    stage = options.stage or re.sub(r"^pipeline\.", "", options.module or "")
    if stage not in STAGES:
        parser.error(f"stage is {stage!r}; expected one of {', '.join(STAGES)}")
    if options.workers < 1 or options.cpus < 1 or options.restarts < 0:
        parser.error("expected --workers and --cpus of at least 1 and --restarts of at least 0")
    end_with_dvc(stage)
    try:
        load_params(options.params)  # a mistake is told before a cluster is asked for anything
        print(f"{stage}: {run(stage, options)}")
    except KeyboardInterrupt:
        print(f"{stage}: interrupted", file=sys.stderr)
        return 130
    except (StageError, OSError) as error:
        if options.debug:
            raise
        print(f"{stage}: {explain(error)}", file=sys.stderr)
        return error.exit_code if isinstance(error, StageError) else 1
    return 0


def run(stage: str, options: argparse.Namespace) -> str:
    """Run the stage on the workers; its summary line. What Ray started here has ended when this returns.

    Raises the stage's own StageError; ParamsError when Ray is not installed or its cluster not there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers import PyTorch, from a shared disk perhaps; after Ray's own 60 s it would start them over, again and again.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    if not options.address:
        # Ray's switch for systems that ask about every port: a cluster of one machine then stays on loopback.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import psutil
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer
    except ModuleNotFoundError as error:
        raise ParamsError(f"{error.name} is not installed; pip install 'tailor[ray]'") from None
    folder = Path.cwd()
    # Where the code is: workers run the same, also when it is not installed.
    code = {"PYTHONPATH": str(Path(pipeline.__file__).parents[1])}
    try:
        # "local": without an address Ray would join whatever cluster it finds on this machine.
        ray.init(
            address=options.address or "local",
            runtime_env={"env_vars": code},
            log_to_driver=options.debug,
            logging_level="warning" if options.debug else "error",
            **_own_cluster(options),
        )
    except ConnectionError as error:
        raise ParamsError(f"--address is {options.address!r}: {' '.join(str(error).split())}") from None
    kept = folder / TEACHER.with_name(".ray")
    kept.mkdir(parents=True, exist_ok=True)
    said = kept / "said.txt"
    said.write_text("", encoding="utf-8")
    try:
        # What NCCL joins must lie on GPUs: with device: cpu the workers ask for none.
        gpus = load_params(options.params).device != "cpu" and ray.cluster_resources().get("GPU", 0) >= options.workers
        trainer = TorchTrainer(
            _work,
            train_loop_config={"stage": stage, "folder": str(folder), "params": str(options.params), "said": str(said)},
            scaling_config=ScalingConfig(
                num_workers=options.workers, use_gpu=gpus, resources_per_worker={"CPU": options.cpus, "GPU": int(gpus)}
            ),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            run_config=RunConfig(
                name=stage, storage_path=str(kept), failure_config=FailureConfig(max_failures=options.restarts)
            ),
        )
        with _shown(said):
            return trainer.fit().return_value
    except TrainingFailedError as error:
        raise _cause(error) from error
    finally:
        # Ray leaves some of its watchers to end by themselves, minutes later, with our output still in their hands.
        started = [] if options.address else psutil.Process().children(recursive=True)
        ray.shutdown()
        for process in psutil.wait_procs(started, timeout=10)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(kept, ignore_errors=True)


def _own_cluster(options: argparse.Namespace) -> dict[str, Any]:
    """What a cluster of our own is given: CPUs for the workers, no dashboard. Nothing for one that runs."""
    if options.address:
        return {}
    return {"num_cpus": options.workers * options.cpus, "include_dashboard": False}


def _work(task: dict[str, str]) -> str:
    """One worker's share, in the project's folder; the stage's summary. Ray has set the ranks and joined the process group."""
    os.chdir(task["folder"])
    stage = importlib.import_module(f"pipeline.{task['stage']}")
    # One of them speaks. By way of a file, because Ray puts its own words before and between the lines.
    where = Path(task["said"] if os.environ["RANK"] == "0" else os.devnull)
    with where.open("a", buffering=1, encoding="utf-8") as said, contextlib.redirect_stdout(said):
        return str(stage.run(load_params(Path(task["params"]))))


@contextlib.contextmanager
def _shown(said: Path) -> Iterator[None]:
    """A block in which what is appended to a file is printed as it comes."""
    ended = threading.Event()

    def follow() -> None:
        with said.open(encoding="utf-8") as stream:
            while True:
                last = ended.wait(0.2)
                if text := stream.read():
                    print(text, end="", flush=True)
                elif last:
                    return

    follower = threading.Thread(target=follow, name="said", daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


def _cause(failed: Exception) -> Exception:
    """The stage's own error, by the first worker that has one; else that workers were lost, in one line."""
    failures = dict(getattr(failed, "worker_failures", {}))
    own = [error for _, error in sorted(failures.items()) if isinstance(error, StageError | OSError)]
    if own:
        return own[0]
    first = next(iter(failures.values()), failed)
    return StageError(
        f"Ray lost the workers: {' '.join(str(first).split())[-300:]}; run it again and it goes on from its checkpoint"
    )


if __name__ == "__main__":
    sys.exit(main())

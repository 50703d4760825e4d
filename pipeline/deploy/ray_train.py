"""Run a training stage as a Ray Train job; the stage is the same that `torchrun` starts.

Ray places the workers, joins them to a process group and restarts them if one is lost. Each worker then runs the stage,
which resumes from its checkpoint. The stage itself, not Ray, writes checkpoints, metrics and artifacts.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pipeline
from pipeline.params import load_params
from pipeline.shared.artifacts import TEACHER
from pipeline.shared.errors import ParamsError, StageError, install_command
from serving.shared.terminal import print


@dataclass(frozen=True)
class Job:
    """A training stage in the project's folder, and the workers of a cluster that run it.

    address: a running cluster; None starts one on this machine. cpus: CPUs per worker. restarts: how often lost workers
    are restarted. debug: print Ray's log.
    """

    stage: str
    folder: Path
    params: Path
    workers: int
    address: str | None
    cpus: int
    restarts: int
    debug: bool


def run(job: Job) -> str:
    """Run the stage on the workers and return its summary line. Processes that Ray started here have exited on return.

    Raises the stage's StageError; ParamsError if Ray is not installed or its cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # To import PyTorch from a shared disk can take longer than Ray's 60 s, after which Ray restarts the workers.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    if not job.address:  # off, so that Ray keeps a cluster of one machine on loopback
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import psutil
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer
    except ModuleNotFoundError as error:
        raise ParamsError(f"{error.name} is not installed; {install_command('ray')}") from None
    try:
        # "local": without an address Ray would join any cluster that runs on this machine.
        ray.init(
            address=job.address or "local",
            # Workers import this source tree, also if it is not installed.
            runtime_env={"env_vars": {"PYTHONPATH": str(Path(pipeline.__file__).parents[1])}},
            log_to_driver=job.debug,
            logging_level="warning" if job.debug else "error",
            **({} if job.address else {"num_cpus": job.workers * job.cpus, "include_dashboard": False}),
        )
    except ConnectionError as error:
        raise ParamsError(f"--address is {job.address!r}: {' '.join(str(error).split())}") from None
    storage = job.folder / TEACHER.with_name(".ray")
    storage.mkdir(parents=True, exist_ok=True)
    output = storage / "output.txt"
    output.write_text("", encoding="utf-8")
    try:
        # NCCL needs GPU tensors; with device: cpu the workers request no GPU and use gloo.
        gpus = load_params(job.params).device != "cpu" and ray.cluster_resources().get("GPU", 0) >= job.workers
        task = {"stage": job.stage, "folder": str(job.folder), "params": str(job.params), "output": str(output)}
        resources, failures = {"CPU": job.cpus, "GPU": int(gpus)}, FailureConfig(max_failures=job.restarts)
        trainer = TorchTrainer(
            _run_worker,
            train_loop_config=task,
            scaling_config=ScalingConfig(num_workers=job.workers, use_gpu=gpus, resources_per_worker=resources),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            run_config=RunConfig(name=job.stage, storage_path=str(storage), failure_config=failures),
        )
        with _print_appended(output):
            return trainer.fit().return_value
    except TrainingFailedError as error:
        raise worker_error(error) from error
    finally:
        # Some Ray processes exit minutes after shutdown and keep this process's stdout open until then; end them here.
        started = [] if job.address else psutil.Process().children(recursive=True)
        ray.shutdown()
        for process in psutil.wait_procs(started, timeout=10)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(storage, ignore_errors=True)


def _run_worker(task: dict[str, str]) -> str:
    """Run the stage as one worker, in the project's folder, and return its summary.

    Ray has set the rank variables and joined the process group before this call.
    """
    os.chdir(task["folder"])
    stage = importlib.import_module(f"pipeline.{task['stage']}")
    # Rank 0 prints through a file, because Ray adds text before and between lines on stdout.
    log = Path(task["output"] if os.environ["RANK"] == "0" else os.devnull)
    with log.open("a", buffering=1, encoding="utf-8") as output, contextlib.redirect_stdout(output):
        return str(stage.run(load_params(Path(task["params"]))))


@contextlib.contextmanager
def _print_appended(output: Path) -> Iterator[None]:
    """Context manager that prints the text appended to a file while the block runs."""
    ended = threading.Event()

    def follow() -> None:
        with output.open(encoding="utf-8") as stream:
            while True:
                last = ended.wait(0.2)
                if text := stream.read():
                    print(text, end="", flush=True)
                elif last:
                    return

    follower = threading.Thread(target=follow, name="output", daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join()


def worker_error(failed: Exception) -> Exception:
    """The stage's error of the first worker that has one; else a StageError that workers were lost."""
    failures = dict(getattr(failed, "worker_failures", {}))
    for _, error in sorted(failures.items()):
        if isinstance(error, StageError | OSError):
            return error
    first = next(iter(failures.values()), failed)
    return StageError(
        f"Ray lost the workers: {' '.join(str(first).split())[-300:]}; run it again to resume from its checkpoint"
    )

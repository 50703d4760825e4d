"""A training stage as a Ray Train job, for teams that have Ray; the same stage that `torchrun` starts.

Ray places the workers, joins them to a process group and restarts them when one is lost; each then runs the stage, which
resumes from its checkpoint. Ray does nothing else: checkpoints, metrics and artifacts are the stage's own.
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
from typing import Any

import pipeline
from pipeline.params import load_params
from pipeline.shared.artifacts import TEACHER
from pipeline.shared.errors import ParamsError, StageError
from serving.shared.terminal import print


@dataclass(frozen=True)
class Job:
    """A training stage in the project's folder, and the workers of a cluster that run it.

    address: a running cluster; None starts one on this machine. cpus: of a worker. restarts: how often lost workers are
    restarted. debug: print Ray's log.
    """

    stage: str
    folder: Path
    params: Path
    workers: int = 1
    address: str | None = None
    cpus: int = 1
    restarts: int = 0
    debug: bool = False


def run(job: Job) -> str:
    """Run the stage on the workers; its summary line. What Ray started here has ended when this returns.

    Raises the stage's own StageError; ParamsError when Ray is not installed or its cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Workers import PyTorch, from a shared disk perhaps; after Ray's own 60 s it would start them over, again and again.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    if not job.address:
        # Ray's switch for systems that ask about every port: a cluster of one machine then stays on loopback.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import psutil
        import ray
        from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
        from ray.train.torch import TorchConfig, TorchTrainer
    except ModuleNotFoundError as error:
        raise ParamsError(f"{error.name} is not installed; pip install 'tailor[ray]'") from None
    # Where the code is: workers run the same, also when it is not installed.
    code = {"PYTHONPATH": str(Path(pipeline.__file__).parents[1])}
    try:
        # "local": without an address Ray would join whatever cluster it finds on this machine.
        ray.init(
            address=job.address or "local",
            runtime_env={"env_vars": code},
            log_to_driver=job.debug,
            logging_level="warning" if job.debug else "error",
            **_own_cluster(job),
        )
    except ConnectionError as error:
        raise ParamsError(f"--address is {job.address!r}: {' '.join(str(error).split())}") from None
    kept = job.folder / TEACHER.with_name(".ray")
    kept.mkdir(parents=True, exist_ok=True)
    output = kept / "output.txt"
    output.write_text("", encoding="utf-8")
    try:
        # What NCCL joins must lie on GPUs: with device: cpu the workers ask for none.
        gpus = load_params(job.params).device != "cpu" and ray.cluster_resources().get("GPU", 0) >= job.workers
        trainer = TorchTrainer(
            _work,
            train_loop_config={
                "stage": job.stage,
                "folder": str(job.folder),
                "params": str(job.params),
                "output": str(output),
            },
            scaling_config=ScalingConfig(
                num_workers=job.workers, use_gpu=gpus, resources_per_worker={"CPU": job.cpus, "GPU": int(gpus)}
            ),
            torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
            run_config=RunConfig(
                name=job.stage, storage_path=str(kept), failure_config=FailureConfig(max_failures=job.restarts)
            ),
        )
        with _shown(output):
            return trainer.fit().return_value
    except TrainingFailedError as error:
        raise _cause(error) from error
    finally:
        # Ray leaves some of its watchers to end by themselves, minutes later, with our output still in their hands.
        started = [] if job.address else psutil.Process().children(recursive=True)
        ray.shutdown()
        for process in psutil.wait_procs(started, timeout=10)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(kept, ignore_errors=True)


def _own_cluster(job: Job) -> dict[str, Any]:
    """What a cluster of our own is given: CPUs for the workers, no dashboard. Nothing for one that runs."""
    if job.address:
        return {}
    return {"num_cpus": job.workers * job.cpus, "include_dashboard": False}


def _work(task: dict[str, str]) -> str:
    """Run the stage as one worker, in the project's folder; its summary. Ray has set the ranks and joined the process group."""
    os.chdir(task["folder"])
    stage = importlib.import_module(f"pipeline.{task['stage']}")
    # One worker prints, through a file, because Ray adds its own text before and between the lines.
    where = Path(task["output"] if os.environ["RANK"] == "0" else os.devnull)
    with where.open("a", buffering=1, encoding="utf-8") as output, contextlib.redirect_stdout(output):
        return str(stage.run(load_params(Path(task["params"]))))


@contextlib.contextmanager
def _shown(output: Path) -> Iterator[None]:
    """A block in which what is appended to a file is printed as it comes."""
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


def _cause(failed: Exception) -> Exception:
    """The stage's own error, by the first worker that has one; else that workers were lost, in one line."""
    failures = dict(getattr(failed, "worker_failures", {}))
    own = [error for _, error in sorted(failures.items()) if isinstance(error, StageError | OSError)]
    if own:
        return own[0]
    first = next(iter(failures.values()), failed)
    return StageError(
        f"Ray lost the workers: {' '.join(str(first).split())[-300:]}; run it again to resume from its checkpoint"
    )

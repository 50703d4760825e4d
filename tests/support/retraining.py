"""A project whose stages copy prepared results: the real flow, DVC, Prefect and Triton, without training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import yaml

from models.prior import shot_group
from pipeline.data.class_prior import Prior
from tests.serving.conftest import CLASSES, COUNTS, write_export
from tests.support.project import GIT_NAME

ROOT = Path(__file__).parents[2]
STAGES = {
    "split": "data/split",
    "prior": "artifacts/prior.json",
    "teacher": "artifacts/teacher",
    "student": "artifacts/student",
    "evaluate": "artifacts/evaluation",
    "export": "artifacts/export",
}
METRICS = "artifacts/evaluation/metrics/student_balanced.json"
PER_CLASS = 100  # test samples: enough for the gate in every group
# No retries and no rehearsal on a second server.
QUICK = {"retries": 0, "retry_seconds": 0.1, "rehearsal": False, "watch_seconds": 0.0, "load_seconds": 20}


class Retraining:
    """A project at `root`. api: URL of a Prefect server; None: the command starts one."""

    def __init__(self, root: Path, api: str | None = None, **settings: object) -> None:
        self.root = root
        root.mkdir(parents=True)
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "DVC_NO_ANALYTICS": "1",
            "ORT_DISABLE_TELEMETRY": "1",
            "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_HOME": str(root / ".prefect"),
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "200",
        }
        self.environment.pop("PREFECT_API_URL", None)  # another test's server
        if api:
            self.environment["PREFECT_API_URL"] = api
        params = yaml.safe_load((ROOT / "params.yaml").read_text())
        params["retrain"] |= QUICK | settings
        params["gate"] |= {"resamples": 200, "floor": 0.3}
        (root / "params.yaml").write_text(yaml.safe_dump(params))
        stages, before = {}, []
        for name, output in STAGES.items():
            copy = f"mkdir -p {Path(output).parent} && cp -r prepared/$(cat challenger)/{name} {output}"
            stages[name] = {"cmd": copy, "deps": ["challenger", *before], "outs": [output]}
            before = [output]
        (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages, "metrics": [METRICS]}))
        begin = (["git", "init", "--quiet", "."], ["dvc", "init", "--quiet"], ["git", "add", "-A"])
        for command in (*begin, ["git", *GIT_NAME, "commit", "--quiet", "-m", "a project"]):
            self.run(*command)

    @property
    def repository(self) -> Path:
        """The repository of promoted releases."""
        return self.root / "releases"

    def prepare(self, name: str, seed: int, accuracy: float | list[float]) -> None:
        """Prepare a challenger. seed: of its graph. accuracy: share of correct test predictions, one or per class."""
        folder = self.root / "prepared" / name
        write_export(folder / "export", seed)
        self.edit_manifest(name, version=1)
        for split in ("train", "validation", "test"):
            labels = np.repeat(np.arange(len(CLASSES)), PER_CLASS)
            ids = [f"{split}-{number}" for number in range(len(labels))]
            table = pa.table(
                {"sample_id": ids, "label": labels, "sha256": [f"{split}{i:x}" for i in ids_to_numbers(ids)]}
            )
            (folder / "split").mkdir(exist_ok=True)
            pyarrow.parquet.write_table(table, folder / "split" / f"{split}.parquet")
        (folder / "split" / "classes.json").write_text(json.dumps(CLASSES))
        p = np.array(COUNTS) / sum(COUNTS)
        prior = Prior(CLASSES, COUNTS, p.tolist(), np.log(p).tolist(), [shot_group(n) for n in COUNTS])
        (folder / "prior").write_text(json.dumps(asdict(prior)))
        random = np.random.default_rng(
            7
        )  # one seed for all challengers: a higher accuracy is correct wherever a lower one is
        right = random.random(len(labels)) < np.broadcast_to(accuracy, len(CLASSES))[labels]
        logits = np.eye(len(CLASSES))[np.where(right, labels, (labels + 1) % len(CLASSES))] * 3.0
        (folder / "evaluate/metrics").mkdir(parents=True)
        (folder / "evaluate/metrics/student_balanced.json").write_text(json.dumps({"all": float(right.mean())}))
        rows = pa.array(list(logits.astype(np.float32)), type=pa.list_(pa.float32()))
        answered = pa.table({"sample_id": ids, "label": labels, "logits": rows})
        pyarrow.parquet.write_table(answered, folder / "evaluate" / "predictions.parquet")
        (folder / "evaluate" / "report.html").write_text(f"<p>{name}</p>")
        for stage in ("teacher", "student"):
            (folder / stage).write_text(name)

    def edit_manifest(self, name: str, **changes: object) -> None:
        """Rewrite the manifest of a prepared export."""
        path = self.root / "prepared" / name / "export" / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def choose(self, name: str) -> None:
        """Select the challenger that the stages produce at their next run."""
        (self.root / "challenger").write_text(name)

    def set(self, section: str, **changes: object) -> None:
        """Change values of params.yaml."""
        path = self.root / "params.yaml"
        params = yaml.safe_load(path.read_text())
        params[section] |= changes
        path.write_text(yaml.safe_dump(params))

    def start_into(self, log: TextIO, *arguments: str) -> subprocess.Popen[str]:
        """Start `tailor` with its output in a file."""
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline.commands", *arguments],
            cwd=self.root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
        """Run a command in the project; assert the expected exit status."""
        done = subprocess.run(
            command,
            cwd=self.root,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == expect, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


def ids_to_numbers(ids: list[str]) -> list[int]:
    """Return the number in each id."""
    return [int(name.rpartition("-")[2]) for name in ids]

"""The application `tailor`: adds the commands of the pipeline to those of serving.

The modules that this module imports run on the base installation. A command imports torch, PyYAML, Prefect and similar
packages inside its function, so that `tailor --help` is fast and every command can print its --help.
"""

from __future__ import annotations

from pipeline.commands.data import app as data
from pipeline.commands.doctor import doctor
from pipeline.commands.encoders import encoders
from pipeline.commands.evaluation import compare, gate, shifted_priors
from pipeline.commands.experiments import experiments
from pipeline.commands.init import init, new, recipe
from pipeline.commands.methods import app as methods
from pipeline.commands.retrain import add_class, history, ingest, retrain, schedule
from pipeline.commands.training import memory, ray_train
from serving.commands.app import OPERATE, PREPARE, TRAIN, add, app
from serving.commands.app import main as main

RECIPE = """\b
Examples:
  tailor recipe recipes/cifar100-if100-400.yaml, then: dvc repro
  tailor recipe recipes/cifar100-if100-400.yaml --dry-run
  tailor recipe recipes/imagenet-lt-90.yaml recipes/variants/k-m-3.yaml

`git checkout params.yaml` undoes it."""
MEMORY = """\b
Examples:
  tailor memory                                    params.yaml, classes of artifacts/prior.json
  tailor memory --classes 8142 --images 437513     before there is a split
  tailor memory --stage teacher --card 24"""
RAY_TRAIN = """\b
Examples:
  tailor ray-train student --workers 2             two processes on this machine; a GPU each, where it has GPUs
  RAY_ADDRESS=ray-head:6379 tailor ray-train student --workers 16
  TAILOR_LAUNCH='tailor ray-train --workers 8' dvc repro

The project's folder must be on a disk that all hosts share, at the same path: docs/many-machines.md."""
GATE = """\b
Examples:
  tailor gate                                      the first model: is it good enough?
  tailor gate --champion versions/7/predictions.parquet --champion-prior versions/7/prior.json

Exit status 0: promote. 1: refuse, which includes a gate that cannot be computed. 2: misuse. 3: not decided, because a
rule has too few test images."""

add(new, PREPARE, "Example: tailor new trees, then put a folder of images per class into trees/data/source")
add(init, PREPARE, "Example: tailor init data/source, then: dvc repro")
add(recipe, PREPARE, RECIPE)
app.add_typer(data, name="data", rich_help_panel=PREPARE)
add(ingest, PREPARE, "Example: tailor ingest --drop data/drop --json | jq .quarantined")
add(encoders, PREPARE, "Example: tailor encoders efficientnet_lite0 --measure")
add(memory, TRAIN, MEMORY)
add(ray_train, TRAIN, RAY_TRAIN)
app.add_typer(methods, name="methods", rich_help_panel=TRAIN)
add(
    compare,
    TRAIN,
    "Example: tailor compare main . --html comparison.html, or: tailor compare champion artifacts, or: tailor compare 3 4",
)
add(experiments, TRAIN, "Example: tailor experiments --all-commits --json | jq '.[] | {name, metrics}'")
add(shifted_priors, TRAIN, "Example: tailor shifted-priors --draws 100 --output artifacts/shift.csv")
add(gate, OPERATE, GATE)
add(retrain, OPERATE, "Example: tailor retrain --because 'labels of class 7 were corrected'")
add(
    add_class,
    OPERATE,
    "Example: tailor add-class fox photos/fox --held-out 10",
)
add(schedule, OPERATE, "Example: tailor schedule --cron '0 3 * * *' --timezone Europe/London")
add(history, OPERATE, "Example: tailor history --json | jq '.versions[] | {version, state, data_sha256}'")
add(doctor, OPERATE, "Example: tailor doctor --json | jq '.[] | select(.state != \"ok\")'")

"""Run the commands of `tailor data` in this process, and generate images for them."""

from __future__ import annotations

import json

import numpy as np
import yaml
from PIL import Image

from pipeline.commands.app import main


def scene(seed):
    """Return a picture with coarse structure, like a photograph."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC)


def command(tmp_path, made, *options, name="check"):
    """Run the command on params in this process; return its exit code."""
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(made.model_dump(mode="json")))
    where = ["--output", str(tmp_path / "report")] if name == "check" else []
    return main(["data", name, "--params", str(path), *where, *options])


def report(tmp_path):
    return json.loads((tmp_path / "report/report.json").read_text())

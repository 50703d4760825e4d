"""`make demo-photos` runs all stages on a folder of JPEGs with the installed weights of EfficientNet-Lite0."""

from __future__ import annotations

import os
import shutil
import subprocess

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.support.making import ROOT

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]
SHARES = {"red": (14, (200, 60, 60)), "green": (8, (60, 200, 60)), "blue": (4, (60, 60, 200))}


def make(tmp_path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make in the environment of the tests: `-o install` skips the target `install`."""
    command = ["make", "-o", "install", "demo-photos", f"PHOTOS={tmp_path / 'project'}", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_demo_photos_trains_serves_and_compares_on_a_folder_of_photographs(tmp_path):
    draw = np.random.default_rng(0)
    for name, (count, colour) in SHARES.items():
        folder = tmp_path / "my photos" / name
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(draw.normal(colour, 40, (60, 50, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((200, 240)).save(folder / f"{number}.jpg")
    done = make(tmp_path, f"FOLDER={tmp_path / 'my photos'}")
    assert done.returncode == 0, done.stdout + done.stderr
    params = yaml.safe_load((tmp_path / "project/params.yaml").read_text(encoding="utf-8"))
    assert params["encoder"]["name"] == "efficientnet_lite0" and params["image"]["size"] == 224
    words = " ".join(done.stdout.split())
    assert "efficientnet_lite0: features of 26 images, 26 computed" in words
    assert "student − cross-entropy" in words and "The server was stopped cleanly." in words


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize("arguments", [(), ("FOLDER=nowhere",)])
def test_make_demo_photos_needs_a_folder(tmp_path, arguments):
    done = make(tmp_path, *arguments)
    assert done.returncode == 2
    assert (
        "expected a folder that holds a folder of images for each class, for example: make demo-photos" in done.stderr
    )
    assert not (tmp_path / "project").exists()

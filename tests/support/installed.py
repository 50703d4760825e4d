"""Install Tailor's wheel in a separate virtual environment, and create projects there with `tailor new`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support.project import ROOT, OwnProject

SOURCES = ("models", "pipeline", "serving", "tailor", "recipes", "pyproject.toml", "setup.py", "README.md")
PNG = b"\x89PNG\r\n"
QUICK = {
    part: {"backbone": "resnet20", "epochs": 1, "batch_size": 8, "schedule": {"warmup_epochs": 0}}
    for part in ("teacher", "student")
} | {"image": {"size": 16, "resize_to": 16}, "student": {"queue_total": 64}}
QUICK["student"] = {**QUICK["teacher"], **QUICK["student"]}


class Installed:
    """A virtual environment with Tailor's wheel; dependencies come from the environment that runs the tests."""

    def __init__(self, folder: Path) -> None:
        source = folder / "source"
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        for name in SOURCES:
            target = source / name
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, target, ignore=ignored, symlinks=True)
            elif (ROOT / name).is_file():
                shutil.copyfile(ROOT / name, target)
        self.root = folder / "environment"
        venv.create(self.root, symlinks=True)
        self.packages = Path(sysconfig.get_path("purelib", vars={"base": str(self.root), "platbase": str(self.root)}))
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
        offline = ("--quiet", "--no-deps", "--no-index")
        run(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder, source)
        (wheel,) = folder.glob("*.whl")
        run(*pip, "--python", self.root / "bin/python", "install", *offline, wheel)
        others = [path for path in sys.path if Path(path).name == "site-packages"]
        (self.packages / "others.pth").write_text("\n".join(others) + "\n", encoding="utf-8")
        dvc = self.root / "bin/dvc"
        dvc.write_text(f"#!{self.root}/bin/python\nimport sys\nfrom dvc.cli import main\nsys.exit(main())\n")
        dvc.chmod(0o755)

    def new(self, folder: Path, *options: str) -> OwnProject:
        """Create a project with `tailor new`."""
        project = OwnProject(folder, self.root / "bin", code=None)
        run(self.root / "bin/tailor", "new", folder, *options, environment=project.environment)
        return project


def run(*command: object, environment: dict[str, str] | None = None) -> None:
    """Run a command; assert exit status 0."""
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=environment, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"


def put_images(folder: Path, counts: tuple[int, ...] = (16, 10, 6), seed: int = 0) -> None:
    """Write small PNG files of noise around a colour, one folder per class."""
    generator = np.random.default_rng(seed)
    for label, count in enumerate(counts):
        (folder / f"class{label}").mkdir(parents=True)
        for number in range(count):
            pixels = np.clip(generator.normal(60 + 60 * label, 30, (20, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label}/{number}.png")

"""Project and lists for the tests that run the commands and programs in the blocks of the README and docs/.

A page is followed in order, in a project that meets its requirements. Commands in REFER are run on another page, those
in LONG by `make test-docs`, those in ELSEWHERE need what a test lacks; the last two are checked by the parsers only.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from serving.gateway.config import Gateway
from serving.gateway.nginx_process import find_nginx
from serving.shared.errors import ServingError
from tests.support.documented import ROOT, commands, steps
from tests.support.project import SHORT, OwnProject, Project
from tests.support.reader import Reader
from tests.support.running_gateway import make_certificate

SIZES = {"cat": 60, "dog": 40, "oak": 28, "elm": 20, "ant": 15, "bee": 12, "cow": 9, "hen": 7, "owl": 5, "fox": 4}
# Settings that only save time; everything else stays as chosen by `tailor init`.
QUICK = {part: {**SHORT[part], "epochs": 2} for part in ("teacher", "student")}
OWN = ["docs/own-images.md", "docs/target-prior.md", "docs/drift.md", "README.md", "docs/data-sources.md",
       "docs/serving.md", "docs/new-images.md"]  # fmt: skip
FOLLOWED = ["docs/index.md", *OWN, "docs/retraining.md", "docs/retraining-schedule.md", "docs/retraining-faults.md",
            "docs/paper.md", "recipes/README.md", "CONTRIBUTING.md"]  # fmt: skip

# (page, beginning of the command) → the page on which the same command is run in the same project.
REFER = {
    ("README.md", "make demo"): "docs/index.md",
    ("README.md", "tailor new trees"): "docs/own-images.md",
    ("README.md", "tailor init"): "docs/own-images.md",
    ("README.md", "tailor data check"): "docs/own-images.md",
    ("README.md", "dvc repro"): "docs/own-images.md",
    ("docs/encoders.md", "tailor new trees"): "docs/own-images.md",
    ("docs/encoders.md", "tailor init"): "docs/own-images.md",
    ("docs/encoders.md", "dvc repro"): "docs/own-images.md",
    ("docs/encoders.md", "tailor serve"): "docs/own-images.md",
    ("docs/published-data.md", "tailor data check"): "docs/data-sources.md",
}
LONG = {
    ("docs/serving.md", "tailor loadtest"): "load for two and for ten minutes",
    ("docs/new-images.md", "dvc repro"): "trains once more",
    ("docs/retraining.md", "make retrain-demo"): "three minutes of a processor",
    ("docs/many-machines.md", "tailor ray-train student --workers 2"): "a Ray cluster of its own",
    ("docs/security.md", "TAILOR_HOSTILE_REQUESTS"): "ten thousand requests; the suite sends 500 of them",
}
ELSEWHERE = {
    ("docs/own-images.md", "dvc remote add"): "a bucket",
    ("docs/own-images.md", "dvc push"): "a bucket",
    ("README.md", "make test"): "this suite itself",
    ("CONTRIBUTING.md", "make install"): "downloads 8 GB",
    ("CONTRIBUTING.md", "make test"): "this suite itself",
    ("CONTRIBUTING.md", "make test-fast"): "a part of this suite",
    ("CONTRIBUTING.md", "make test-faults"): "the other part of this suite",
    ("CONTRIBUTING.md", "make test-docs"): "what runs this file",
    ("CONTRIBUTING.md", "make docs"): "built by tests/test_docs.py into a folder of its own",
    ("README.md", "make demo-photos"): "a folder of photographs; with one: tests/end_to_end/test_demo_photos.py",
    ("docs/encoders.md", "tailor encoders"): "measures; the list: tests/pipeline/model_io/test_encoder.py",
    ("docs/paper.md", "dvc repro"): "needs the CIFAR-100 archive",
    ("docs/paper.md", "dvc exp run"): "needs the CIFAR-100 archive; seeds: tests/pipeline/test_seeds.py",
    ("recipes/README.md", "dvc repro"): "needs the CIFAR-100 archive",
    ("docs/many-machines.md", "torchrun"): "two hosts of eight GPUs; two processes: test_torchrun.py",
    ("docs/many-machines.md", "kubectl"): "a cluster; the manifests: tests/pipeline/deploy/test_training_manifests.py",
    ("docs/many-machines.md", "RAY_ADDRESS"): "a Ray cluster",
    ("docs/many-machines.md", "TAILOR_LAUNCH"): "eight GPUs; DVC with two workers: test_many_machines.py",
    ("docs/serving.md", "docker"): "a Docker engine; what the image starts: tests/serving/deploy/test_container.py",
    (
        "docs/serving.md",
        "tailor promote artifacts/export --repository releases --url grpc://127.0.0.1:8001",
    ): "that container; the same swap: tests/serving/deploy/test_container.py",
    (
        "docs/observability.md",
        "tailor serve --trace-url",
    ): "a collector; with one: tests/serving/server/test_server_options.py",
    ("docs/signed-releases.md", "tailor keys"): "tests/serving/commands/test_keys_command.py follows the page",
    ("docs/signed-releases.md", "TAILOR_SIGNING_KEY"): "the same",
    ("docs/signed-releases.md", "TAILOR_TRUSTED_KEYS"): "the same",
    ("docs/compare-methods.md", "dvc repro"): "the stages of docs/training.md",
    ("docs/compare-methods.md", "tailor methods"): "tests/pipeline/commands/test_methods_command.py",
    ("docs/compare-methods.md", "tailor recipe"): "tests/pipeline/params/test_recipe.py",
    (
        "docs/text-centres.md",
        "dvc repro",
    ): "tests/end_to_end/test_dvc_stages.py, tests/pipeline/text/test_text_features.py",
    ("docs/text-centres.md", "pip install"): "a download",
    ("docs/text-centres.md", "tailor recipe"): "tests/pipeline/params/test_recipe.py",
    ("docs/text-centres.md", "tailor methods"): "tests/pipeline/commands/test_methods_command.py",
    ("docs/methods.md", "tailor recipe"): "tests/pipeline/params/test_recipe.py",
    ("docs/methods.md", "dvc repro"): "the stages of docs/training.md",
    ("docs/method-figures.md", "tailor recipe"): "tests/pipeline/params/test_paper_recipes.py",
    ("docs/method-figures.md", "dvc repro"): "needs the ImageNet archive",
    ("docs/contrast-terms.md", "tailor recipe"): "tests/pipeline/params/test_recipe.py",
    ("docs/contrast-terms.md", "dvc repro"): "the stages of docs/training.md",
    ("docs/contrast-terms.md", "dvc exp run"): "tests/end_to_end/test_dvc_stages.py changes the kind by `dvc repro`",
    ("docs/answers.md", "tailor predict"): "the inputs against a server: tests/serving/triton/test_served_extras.py",
    ("docs/answers.md", "python -m benchmarks.answer_quality"): "a data pack; tests/benchmarks/test_answer_quality.py",
    ("docs/labels.md", "dvc repro"): "the stage: tests/pipeline/test_embed.py",
    ("docs/labels.md", "tailor data"): "tests/pipeline/labels",
    ("docs/labels.md", "python -m benchmarks.label_errors"): "a data pack; tests/benchmarks/test_label_errors.py",
    ("docs/segmentation.md", "tailor data check"): "tests/pipeline/segmentation/test_label_map_sources.py",
    ("docs/segmentation.md", "tailor serve"): "tests/serving/triton/test_served_class_maps.py",
    ("docs/segmentation.md", "tailor segment"): "tests/serving/triton/test_served_class_maps.py",
    ("docs/second-stages.md", "dvc exp run"): "tests/end_to_end/test_dvc_stages.py changes the kind by `dvc repro`",
    ("docs/second-stages.md", "tailor experiments"): "tests/pipeline/commands/test_experiments_command.py",
    ("docs/serving-performance.md", "python -m benchmarks.serving"): "measures for minutes on a quiet machine",
    ("docs/serving-performance.md", "python3 -m venv"): "downloads other servers",
    ("docs/gpu.md", "benchmarks/gpu_pack.sh"): "downloads wheels; the script: tests/benchmarks/test_gpu.py",
    ("docs/gpu.md", "python3 -m pip"): "a machine without network",
    ("docs/gpu.md", "PYTHONPATH"): "a GPU; at a small size: tests/benchmarks/test_gpu.py",
    ("docs/gpu.md", "python -m benchmarks.gpu"): "minutes; tests/benchmarks/test_gpu.py",
}
# Pages whose Python runs elsewhere; that of FOLLOWED runs in its position among the commands.
PROGRAMS_ELSEWHERE = {
    "docs/losses.md": "needs no project: tests/test_docs.py runs it",
    "docs/contrast-terms.md": "needs no project: tests/test_docs.py runs it",
    "docs/answers.md": "the same inputs: tests/serving/triton/test_served_extras.py",
    "docs/segmentation.md": "the same calls: tests/serving/triton/test_served_class_maps.py",
}
# Changes of a test to a command, besides ports: only its size, not its kind.
LESS = {"--log-share 0.01": "--log-share 1"}
LESS_LOAD = {
    "--time 2m": "--time 10s",
    "--time 10m": "--time 20s",
    "--rate 300": "--rate 50",
    "--users 32": "--users 8",
}


def listed(table: dict[tuple[str, str], str], page: str, command: str) -> bool:
    """Return whether a table contains the command, in full or by its first words."""
    return any(page == on and (command == text or command.startswith(f"{text} ") or text in command.split("=")[0])
               for on, text in table)  # fmt: skip


def in_no_table(page: str, command: str) -> bool:
    return not any(listed(table, page, command) for table in (REFER, LONG, ELSEWHERE))


def follow(page: str, reader: Reader, before: dict[str, Callable[[], object]] | None = None) -> dict[str, str]:
    """Run a page's commands and programs in order; return their outputs. before: actions ahead of a command."""
    printed = {}
    try:
        for kind, text in steps(ROOT / page):
            if kind == "python":
                printed[text] = reader.run(text)
                continue
            for beginning, act in (before or {}).items():
                if text.startswith(beginning):
                    act()
            if in_no_table(page, text):
                printed[text] = reader.type(text)
    finally:
        reader.close()
    return printed


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project with 200 images of ten classes, trained and exported by following docs/own-images.md."""
    parent = tmp_path_factory.mktemp("own")
    project = OwnProject(parent / "trees")
    reader = Reader(project, folder=parent)
    hooks = {"tailor init": lambda: write_images(project), "tailor data check": lambda: project.set(QUICK)}
    project.printed = follow("docs/own-images.md", reader, hooks)
    return project


def write_images(project: Project) -> None:
    """Write the images of a project's classes, images for requests, and other files that the pages require."""
    scans = load_digits()
    images = [[Image.fromarray((scan * 15.9).astype("uint8")).resize((28, 28)) for scan in scans.images[scans.target == c]]
                for c in range(10)]  # fmt: skip
    for (name, count), class_images in zip(SIZES.items(), images, strict=True):
        folder = project.root / "data/source" / name
        folder.mkdir(parents=True)
        for index, image in enumerate(class_images[:count]):
            image.save(folder / f"{index}.png")
    images[0][0].save(project.root / "cat.jpg")
    images[1][0].save(project.root / "dog.png")
    for folder, first in (("photos", 100), ("new", 120)):
        (project.root / folder).mkdir()
        for index, image in enumerate(images[0][first : first + 12]):
            image.save(project.root / folder / f"{index}.jpg")
    shares = dict.fromkeys(SIZES, 0.0125) | {"cat": 0.7, "dog": 0.2}
    (project.root / "shop.json").write_text(json.dumps(shares), encoding="utf-8")
    make_certificate(project.root)


def has_nginx() -> bool:
    try:
        find_nginx(Gateway())
    except ServingError:
        return False
    return True


def commands_of(page: str, beginning: str) -> list[str]:
    return [command for command in commands(ROOT / page) if command.startswith(beginning)]

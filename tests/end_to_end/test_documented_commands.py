"""Run every command and Python program in the blocks of the README and docs/, page by page; exceptions are listed here.

A page is followed in order, in a project that meets its requirements. Commands in REFER are run on another page, those
in LONG by `make test-docs`, those in ELSEWHERE need what a test lacks; the last two are checked by the parsers only.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from serving.drift.estimate import write_live_prior
from serving.gateway.config import Gateway
from serving.gateway.nginx_process import find_nginx
from serving.repository.manifest import read_manifest
from serving.repository.writer import write_repository
from serving.shared.errors import ServingError
from tests.support.documented import PAGES, ROOT, blocks, check_command, commands, name_of, steps
from tests.support.project import SHORT, OwnProject, Project
from tests.support.reader import Reader
from tests.support.retraining import Retraining
from tests.support.running_gateway import make_certificate

pytestmark = pytest.mark.end_to_end

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
    ("docs/serving-performance.md", "python -m benchmarks.serving"): "measures for minutes on a quiet machine",
    ("docs/serving-performance.md", "python3 -m venv"): "downloads other servers",
}
# Pages whose Python runs elsewhere; that of FOLLOWED runs in its position among the commands.
PROGRAMS_ELSEWHERE = {"docs/losses.md": "needs no project: tests/test_docs.py runs it"}
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


def test_every_command_is_typed_or_listed_and_nothing_is_listed_that_no_page_says() -> None:
    typed = {(name_of(page), command) for page in PAGES for command in commands(page)}
    forgotten = [one for one in typed if in_no_table(*one) and one[0] not in FOLLOWED]
    assert forgotten == []
    for table in (REFER, LONG, ELSEWHERE):
        for entry in table:
            assert any(listed({entry: ""}, *one) for one in typed), f"{entry} stands on no page"
    for (page, text), other in REFER.items():
        assert other in FOLLOWED and any(command.startswith(text) for command in commands(ROOT / other)), page


def test_every_program_of_a_page_is_run_or_listed_and_nothing_is_listed_that_has_none() -> None:
    having = {name_of(page) for page in PAGES if blocks(page, "python")}
    assert having - set(FOLLOWED) == set(PROGRAMS_ELSEWHERE)


@pytest.mark.parametrize(
    ("page", "command"),
    sorted({(name_of(page), command) for page in PAGES for command in commands(page)
            if listed(LONG | ELSEWHERE, name_of(page), command)}),
)  # fmt: skip
def test_a_command_that_is_not_typed_is_one_that_its_program_takes(page: str, command: str) -> None:
    check_command(command)
    for word in command.split():  # check that its files exist
        if word.startswith(("pipeline/", "tests/", "benchmarks/", "recipes/")):
            assert (ROOT / word).is_file(), f"{page}: {word} is not there"


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
    hooks = {"tailor init": lambda: put_pictures(project), "tailor data check": lambda: project.set(QUICK)}
    project.printed = follow("docs/own-images.md", reader, hooks)
    return project


def put_pictures(project: Project) -> None:
    """Write the images of a project's classes, images for requests, and other files that the pages require."""
    scans = load_digits()
    pictures = [[Image.fromarray((scan * 15.9).astype("uint8")).resize((32, 32)) for scan in scans.images[scans.target == c]]
                for c in range(10)]  # fmt: skip
    for (name, count), mine in zip(SIZES.items(), pictures, strict=True):
        folder = project.root / "data/source" / name
        folder.mkdir(parents=True)
        for place, picture in enumerate(mine[:count]):
            picture.save(folder / f"{place}.png")
    pictures[0][0].save(project.root / "cat.jpg")
    pictures[1][0].save(project.root / "dog.png")
    for folder, first in (("photos", 100), ("new", 120)):
        (project.root / folder).mkdir()
        for place, picture in enumerate(pictures[0][first : first + 12]):
            picture.save(project.root / folder / f"{place}.jpg")
    shares = dict.fromkeys(SIZES, 0.0125) | {"cat": 0.7, "dog": 0.2}
    (project.root / "shop.json").write_text(json.dumps(shares), encoding="utf-8")
    make_certificate(project.root)


own_group = pytest.mark.xdist_group("own images")


@own_group
def test_own_images_lead_to_a_report_and_served_answers(own: Project) -> None:
    printed = {" ".join(command.split()[:2]): text for command, text in own.printed.items()}
    assert "imbalance factor 15.0" in printed["tailor init"] and "data check: passed" in printed["tailor data"]
    assert (own.root / "artifacts/evaluation/report.html").stat().st_size > 1000
    rows = list(csv.DictReader(io.StringIO(printed["tailor predict"])))
    assert len({row["image"] for row in rows}) == sum(SIZES.values()) and {row["class"] for row in rows} <= set(SIZES)


@own_group
def test_the_page_on_the_target_prior(own: Project) -> None:
    reader = Reader(own)
    reader.type("tailor serve")
    printed = list(follow("docs/target-prior.md", reader).values())
    assert len(set(printed)) == 3 and all("cat" in text for text in printed)


@own_group
def test_the_page_on_drift(own: Project) -> None:
    reader, asked = Reader(own, LESS), []

    def ask() -> None:
        if not asked:
            asked.extend(reader.type("tailor predict data/source --csv") for _ in range(2))
            until = time.monotonic() + 60
            while not any((own.root / "artifacts/logits").rglob("*.parquet")) and time.monotonic() < until:
                time.sleep(0.1)  # the log is written every ten seconds

    predictions = own.root / "artifacts/evaluation/predictions.parquet"
    evaluated = predictions.read_bytes()

    def enough_test_images() -> None:
        # 38 test images are too few for a calibration: repeat each ten times, which leaves the likelihood unchanged.
        table = pyarrow.parquet.read_table(predictions)
        pyarrow.parquet.write_table(pa.concat_tables([table] * 10), predictions)

    before = {"tailor drift": ask, "tailor drift --since 24h --write": enough_test_images}
    try:
        printed = follow("docs/drift.md", reader, before)
    finally:  # the last command retrains for a large distance, which is random with so few images
        shutil.rmtree(own.root / "releases", ignore_errors=True)
        predictions.write_bytes(evaluated)
    assert "distance from the training prior" in printed["tailor drift --since 24h"]
    assert "live_prior.json" in printed["tailor drift --since 24h --write"]
    assert "│" in printed["tailor predict cat.jpg --prior live"]


@own_group
def test_the_readme(own: Project) -> None:
    repository = own.root / "artifacts/repository"
    manifest = read_manifest(own.root / "artifacts/export")
    write_live_prior(repository, manifest, np.array(manifest.log_prior) * 0 + 1 / len(manifest.classes), {})
    printed = follow("README.md", Reader(own))
    (answer,) = json.loads(printed["tailor predict cat.jpg --prior 0.5 --json"])
    assert len(answer["predictions"]) == 5
    assert_two_answers("README.md", printed)
    (answer,) = (json.loads(text) for command, text in printed.items() if command.startswith("curl"))
    assert {output["name"] for output in answer["outputs"]} == {"class", "index", "probability"}


def assert_two_answers(page: str, printed: dict[str, str]) -> None:
    """Assert that the page's only program printed a class and its probability for each of its two images."""
    (program,) = blocks(ROOT / page, "python")
    answers = [line.rsplit(" ", 1) for line in printed[program].splitlines()]
    assert len(answers) == 2
    assert all(name in SIZES and 0.1 <= float(probability) <= 1 for name, probability in answers)


@own_group
def test_the_page_on_data_sources(own: Project) -> None:
    printed = follow("docs/data-sources.md", Reader(own))
    assert "data check: passed" in printed["tailor data check"]
    assert "location: data/packed" in printed["tailor data pack data/packed"]


@own_group
def test_the_page_on_serving(own: Project) -> None:
    reader = Reader(own)
    if not has_nginx():
        reader.altered["--key tls.key"] = "--key tls.key --write gateway"

    def export_anew() -> None:
        own.set({"serving": {"strength": 0.5}})
        own.run("dvc", "repro", "--single-item", "export")

    try:
        printed = follow("docs/serving.md", reader, {"tailor promote": export_anew})
    finally:
        own.set({"serving": {"strength": 0.0}})
        shutil.rmtree(own.root / "releases", ignore_errors=True)
    assert json.loads(printed["tailor status --json"])["answers"]
    (answer,) = (json.loads(text) for command, text in printed.items() if command.startswith("curl"))
    assert {output["name"] for output in answer["outputs"]} == {"class", "index", "probability"}
    assert_two_answers("docs/serving.md", printed)
    assert "version 2 answers instead of 1" in printed["tailor promote artifacts/export"]
    assert "version 1 answers instead of 2" in printed["tailor rollback"]
    assert "KIND_GPU" in (own.root / "gpu-repository/student/config.pbtxt").read_text(encoding="utf-8")


def has_nginx() -> bool:
    try:
        find_nginx(Gateway())
    except ServingError:
        return False
    return True


@own_group
def test_the_page_on_new_images(own: Project) -> None:
    own.set({"ingest": {"settle_seconds": 0}})  # instead of the wait of one minute in the page
    jq = shutil.which("jq")  # without jq the command is run up to the pipe
    printed = follow("docs/new-images.md", Reader(own, {} if jq else {" | jq '.[] | select(.state != \"ok\")'": ""}))
    assert "12 images added" in printed["tailor ingest"]
    assert "workspace" in printed["tailor experiments"]
    told = printed[next(command for command in printed if command.startswith("tailor doctor --json"))]
    rows = rows_of(told) if jq else [row for row in json.loads(told) if row["state"] != "ok"]
    assert rows and all(row["state"] in ("warning", "failing") for row in rows)


def rows_of(text: str) -> list[dict[str, str]]:
    """Parse the consecutive objects in jq's output."""
    decoder, rows = json.JSONDecoder(), []
    while text := text.strip():
        row, end = decoder.raw_decode(text)
        rows.append(row)
        text = text[end:]
    return rows


@pytest.mark.xdist_group("digits")
def test_the_first_page_and_the_demo(digits: Project) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copyfile(ROOT / name, digits.root / name)
    (digits.root / ".venv").symlink_to(sys.prefix)

    def make_it_short() -> None:
        digits.run("python", "-m", "pipeline.commands", "new", "build/demo")
        OwnProject(digits.root / "build/demo").set(SHORT)

    try:
        printed = follow("docs/index.md", Reader(digits), {"make demo": make_it_short})
    finally:
        shutil.rmtree(digits.root / "build", ignore_errors=True)
        for name in ("Makefile", "pyproject.toml", "constraints.txt", ".venv"):
            (digits.root / name).unlink()
    demo = printed["make demo"]
    assert "student − cross-entropy" in " ".join(demo.split()) and "One seed and 400 test images" in " ".join(
        demo.split()
    )
    assert "HTTP and gRPC agree on 12 images" in demo and "The server was stopped cleanly." in demo and "≠" in demo
    assert "student_balanced.json" in printed["dvc metrics show"]


@pytest.fixture
def retrained(tmp_path: Path) -> Retraining:
    """A project whose served version was trained on old data; its stages have prepared results of new data."""
    project = Retraining(tmp_path / "project")
    project.prepare("old", 1, 0.6)
    project.prepare("new", 2, 0.9)
    write_repository(tmp_path / "project/prepared/old/export", project.repository)
    for name, target in (("evaluate/predictions.parquet", "predictions.parquet"), ("prior", "prior.json")):
        shutil.copy(project.root / "prepared/old" / name, project.repository / "classifier/1" / target)
    project.choose("new")
    return project


@pytest.mark.xdist_group("retraining page")
def test_the_page_on_one_retraining(retrained: Retraining) -> None:
    printed = follow("docs/retraining.md", Reader(retrained))
    (text,) = (text for command, text in printed.items() if command.startswith("tailor retrain"))
    assert "promoted" in text
    for command in ("tailor experiments", "dvc exp list --all-commits"):
        assert re.search(r"retrain-\d{8}-\d{6}-promoted-2", printed[command])
    assert "version 1 answers instead of 2" in printed["tailor rollback"]


@pytest.mark.xdist_group("retraining page")
def test_the_pages_on_a_schedule_and_on_faults(retrained: Retraining) -> None:
    printed = follow("docs/retraining-schedule.md", Reader(retrained))
    assert re.search(r"^ *prefect +ok", printed["tailor doctor"], re.MULTILINE)  # the server of the schedule
    assert "releases" in printed["tailor history"]
    assert "champion" in follow("docs/retraining-faults.md", Reader(retrained))["tailor versions"]


@pytest.mark.parametrize("page", ["docs/paper.md", "recipes/README.md"])
def test_a_page_of_recipes(page: str, tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    for command, text in follow(page, Reader(project)).items():
        assert command.startswith("tailor recipe") and "→" in text


def test_the_page_for_contributors(tmp_path: Path) -> None:
    project = Project(tmp_path / "project")
    for name in ("Makefile", ".pre-commit-config.yaml"):
        shutil.copyfile(ROOT / name, project.root / name)
    project.commit()
    follow("CONTRIBUTING.md", Reader(project))
    assert (project.root / ".git/hooks/pre-commit").is_file()


@pytest.mark.docs_commands
@pytest.mark.timeout(1800)
class TestWhatTakesLong:
    """`make test-docs`."""

    @own_group
    def test_load_on_the_served_model(self, own: Project) -> None:
        reader = Reader(own, LESS_LOAD)
        try:
            reader.type("tailor serve")
            for command in typed_of("docs/serving.md", "tailor loadtest"):
                # On a busy machine a threshold may be missed (status 1), which is not an error of the page.
                printed = reader.type(command, expect=(0, 1))
                assert "p99 ms" in printed and "reports in artifacts/loadtest" in printed
        finally:
            reader.close()

    @own_group
    def test_new_images_are_trained_on(self, own: Project) -> None:
        for command in typed_of("docs/new-images.md", "dvc repro"):
            assert "teacher" in own.stages_run(own.run(*command.split(), "--force"))

    @own_group
    def test_two_workers_of_ray(self, own: Project) -> None:
        (command,) = typed_of("docs/many-machines.md", "tailor ray-train student --workers 2")
        own.set({"student": {"batch_size": 16}})
        assert "artifacts/student" in Reader(own).type(command)

    def test_two_rounds_of_retraining(self, tmp_path: Path) -> None:
        project = Project(tmp_path / "project")
        shutil.copyfile(ROOT / "Makefile", project.root / "Makefile")
        printed = Reader(project).type("make retrain-demo")
        assert "one promoted, one refused" in printed
        listed = printed.partition("$ tailor experiments")[2]
        assert re.search(r"retrain-\d{8}-\d{6}-promoted-1", listed) and re.search(
            r"retrain-\d{8}-\d{6}-refused", listed
        )

    def test_ten_thousand_hostile_requests(self, tmp_path: Path) -> None:
        (command,) = typed_of("docs/security.md", "TAILOR_HOSTILE_REQUESTS")
        report = tmp_path / "hostile.md"
        text = command.replace("hostile.md", str(report), 1)
        subprocess.run(["bash", "-c", f"{text} -q"], cwd=ROOT, check=True, timeout=1700, env=project_path())
        assert report.stat().st_size > 0 or not has_nginx()


def typed_of(page: str, beginning: str) -> list[str]:
    return [command for command in commands(ROOT / page) if command.startswith(beginning)]


def project_path() -> dict[str, str]:
    """Return the environment with this interpreter's bin folder first on PATH."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

"""Run the commands and Python programs of the README and docs/, page by page."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from serving.drift.estimate import write_live_prior
from serving.repository.manifest import read_manifest
from serving.repository.writer import write_repository
from tests.end_to_end.documentation.conftest import LESS, SIZES, follow, has_nginx
from tests.support.documented import ROOT, blocks
from tests.support.project import SHORT, OwnProject, Project
from tests.support.reader import Reader
from tests.support.retraining import Retraining

pytestmark = pytest.mark.end_to_end

own_group = pytest.mark.xdist_group("own images")


@own_group
def test_the_page_on_own_images(own: Project) -> None:
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
    reader, predictions_of, calibratable = Reader(own, LESS), [], []

    def send_requests() -> None:
        if not predictions_of:
            predictions_of.extend(reader.type("tailor predict data/source --csv") for _ in range(2))
            until = time.monotonic() + 60
            while not any((own.root / "artifacts/logits").rglob("*.parquet")) and time.monotonic() < until:
                time.sleep(0.1)  # the log is written every ten seconds

    predictions = own.root / "artifacts/evaluation/predictions.parquet"
    evaluated = predictions.read_bytes()

    def make_calibratable() -> None:
        # 38 test images are too few for a calibration, and a student of a short training may be no better than chance. So write
        # the logits of one that is sure and wrong in as few images as the same NLL needs, and each image ten times.
        table = pyarrow.parquet.read_table(predictions)
        logits, labels = np.array(table["logits"].to_pylist()), table["label"].to_numpy()
        images, classes = logits.shape
        recorded = np.mean(np.logaddexp.reduce(logits, 1) - logits[np.arange(images), labels])
        nll = np.full(images, 0.001)
        wrong = np.linspace(0, images - 1, int(np.ceil(recorded * images / 20))).astype(int)
        nll[wrong] += (recorded * images - nll.sum()) / len(wrong)
        logits = np.repeat(np.log(-np.expm1(-nll) / (classes - 1))[:, None], classes, 1)
        logits[np.arange(images), labels] = -nll
        at = table.schema.get_field_index("logits")
        table = table.set_column(at, table.schema.field(at), pa.array(logits.tolist(), table.schema.field(at).type))
        pyarrow.parquet.write_table(pa.concat_tables([table] * 10), predictions)
        calibratable.append(predictions.read_bytes())

    before = {"tailor drift": send_requests, "tailor drift --since 24h --write": make_calibratable}
    try:
        printed = follow("docs/drift.md", reader, before)
    finally:  # the last command retrains for a large distance, which is random with so few images
        shutil.rmtree(own.root / "releases", ignore_errors=True)
        if predictions.read_bytes() in calibratable:  # and not those of a retrained student
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
    assert_two_predictions("README.md", printed)
    (answer,) = (json.loads(text) for command, text in printed.items() if command.startswith("curl"))
    assert {output["name"] for output in answer["outputs"]} == {"class", "index", "probability"}


def assert_two_predictions(page: str, printed: dict[str, str]) -> None:
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

    def export_again() -> None:
        own.set({"serving": {"strength": 0.5}})
        own.run("dvc", "repro", "--single-item", "export")

    try:
        printed = follow("docs/serving.md", reader, {"tailor promote": export_again})
    finally:
        own.set({"serving": {"strength": 0.0}})
        shutil.rmtree(own.root / "releases", ignore_errors=True)
    assert json.loads(printed["tailor status --json"])["answers"]
    (answer,) = (json.loads(text) for command, text in printed.items() if command.startswith("curl"))
    assert {output["name"] for output in answer["outputs"]} == {"class", "index", "probability"}
    assert_two_predictions("docs/serving.md", printed)
    assert "version 2 answers instead of 1" in printed["tailor promote artifacts/export"]
    assert "version 1 answers instead of 2" in printed["tailor rollback"]
    assert "KIND_GPU" in (own.root / "gpu-repository/student/config.pbtxt").read_text(encoding="utf-8")


@own_group
def test_the_page_on_new_images(own: Project) -> None:
    own.set({"ingest": {"settle_seconds": 0}})  # instead of the wait of one minute in the page
    jq = shutil.which("jq")  # without jq the command is run up to the pipe
    printed = follow("docs/new-images.md", Reader(own, {} if jq else {" | jq '.[] | select(.state != \"ok\")'": ""}))
    assert "12 images added" in printed["tailor ingest"]
    assert "workspace" in printed["tailor experiments"]
    output = printed[next(command for command in printed if command.startswith("tailor doctor --json"))]
    rows = parse_objects(output) if jq else [row for row in json.loads(output) if row["state"] != "ok"]
    assert rows and all(row["state"] in ("warning", "failing") for row in rows)


def parse_objects(text: str) -> list[dict[str, str]]:
    """Parse the consecutive objects in jq's output."""
    decoder, rows = json.JSONDecoder(), []
    while text := text.strip():
        row, end = decoder.raw_decode(text)
        rows.append(row)
        text = text[end:]
    return rows


@pytest.mark.xdist_group("digits")
def test_the_first_page_and_the_demo(digits: Project) -> None:
    shutil.copyfile(ROOT / "Makefile", digits.root / "Makefile")
    (digits.root / ".venv").symlink_to(sys.prefix)

    def shorten_demo() -> None:
        digits.run("python", "-m", "pipeline.commands", "new", "build/demo")
        OwnProject(digits.root / "build/demo").set(SHORT)

    try:
        printed = follow("docs/index.md", Reader(digits), {"make demo": shorten_demo})
    finally:
        shutil.rmtree(digits.root / "build", ignore_errors=True)
        for name in ("Makefile", ".venv"):
            (digits.root / name).unlink()
    demo = printed["make demo"]
    words = " ".join(demo.split())
    assert "student − cross-entropy" in words and "One seed and 400 test images" in words
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
def test_the_pages_on_schedules_and_faults(retrained: Retraining) -> None:
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

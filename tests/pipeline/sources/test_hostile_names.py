"""Control characters, markup and formulas in the names of classes and files, with the pipeline's real commands."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.shared.artifacts import as_csv
from serving.shared.terminal import CONTROLS
from tests.support.making import ROOT, data_params, folder, png, write

pytestmark = pytest.mark.slow
HOSTILE = "\x1b]0;x\x07\x1b[31mred[bold]"
SHOWN = "\\u001b]0;x\\u0007\\u001b[31mred[bold]"


def ran(tmp_path, *command):
    """Run a command in the project; return its output, which must not contain a control character."""
    ended = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    printed = ended.stdout + ended.stderr
    assert not CONTROLS.search(printed), ascii(printed)
    assert "Traceback" not in printed
    return ended.returncode, printed


def project(tmp_path):
    folder(tmp_path / "source", {HOSTILE: 6, "=SUM(A1)": 6})
    made = data_params(Path("source"))
    made = made.model_copy(update={"ingest": made.ingest.model_copy(update={"settle_seconds": 0})})
    write(tmp_path / "params.yaml", made.model_dump_json().encode())
    return tmp_path


def test_data_check_and_its_csv_files_hold_no_control_character_and_no_formula(tmp_path):
    root = project(tmp_path)
    write(root / "source" / HOSTILE / f"-torn{HOSTILE}.png", png(1)[:60])
    status, printed = ran(root, "pipeline.commands", "data", "check")
    assert status == 1 and f"-torn{SHOWN}.png" in printed
    with (root / "artifacts/data_check/classes.csv").open(encoding="utf-8") as stream:
        assert [row["class"] for row in csv.DictReader(stream)] == [SHOWN, "'=SUM(A1)"]
    for path in (root / "artifacts/data_check").glob("*.csv"):
        assert not CONTROLS.search(path.read_text(encoding="utf-8"))


def test_an_error_of_a_stage_and_of_ingest_shows_the_name_written_out(tmp_path):
    root = project(tmp_path)
    write(root / "source/=SUM(A1)/again.png", (root / "source" / HOSTILE / "000.png").read_bytes())
    status, printed = ran(root, "pipeline.split")
    assert status == 1 and printed.count("\n") == 1 and f"source/{SHOWN}/000.png" in printed
    (root / "source/=SUM(A1)/again.png").unlink()
    assert ran(root, "pipeline.split")[0] == 0
    write(root / "data/drop" / f"=new{HOSTILE}" / "a.png", png(77))
    status, printed = ran(root, "pipeline.commands", "ingest")
    assert status == 1 and "1 of 1 row is bad" in printed
    (listing,) = (root / "data/quarantine").glob("*/rows.csv")
    (row,) = csv.DictReader(listing.read_text(encoding="utf-8").splitlines())
    assert row["label"] == f"'=new{SHOWN}" and not CONTROLS.search(listing.read_text(encoding="utf-8"))


def test_tables_of_a_run_are_safe_in_a_spreadsheet_and_numbers_stay_numbers():
    assert as_csv([{"class": "=1+1", "recall": -1.5, "few": None}]) == "class,recall,few\n'=1+1,-1.5,\n"

"""`tailor drift`: output, exit status, writing the live prior, starting a retraining."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from conftest import CLASSES, COUNTS, Release, picture

import serving.commands.drift as command
from models.label_shift import total_variation
from serving.client.sync_client import Client
from serving.commands import main
from serving.commands.drift import TRIGGERS
from serving.drift.calibration import calibration_from
from serving.drift.estimate import estimate_drift
from serving.drift.logged_logits import read_logits
from serving.repository.manifest import Manifest
from serving.repository.release import find_releases
from serving.repository.writer import write_repository
from serving.triton.storage.logit_log import log_files
from tests.support.drift_data import LIVE, TRAINING, damage, drawn, write_predictions
from tests.support.logit_logs import write_log
from tests.support.segmentation_release import write_segmentation_export
from tests.support.tailor_command import assert_one_line

Tailor = Callable[..., CompletedProcess[str]]
Drift = Callable[..., "Ended"]


@pytest.fixture
def own(repository: Path, tmp_path: Path) -> Path:
    """A folder with a repository in its default location, and a log of 2,000 predictions under LIVE."""
    shutil.copytree(repository, tmp_path / "artifacts/repository")
    return tmp_path


@pytest.fixture
def logged(own: Path, release: Release) -> Path:
    write_log(own / "artifacts/logits", release.manifest, drawn(LIVE, 2000)[1])
    return own / "artifacts/logits"


@dataclass(frozen=True)
class Ended:
    """Output and exit status of a command in this process, like CompletedProcess."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def drift(logged: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run `tailor drift` in this process, in the folder where LIVE was logged."""
    monkeypatch.chdir(logged.parents[1])

    def run(*arguments: object) -> Ended:
        status = main(["drift", *map(str, arguments)])
        return Ended(status, *capsys.readouterr())

    return run


def test_command_prints_groups_classes_and_number_of_images(drift: Drift) -> None:
    ended = drift("--top", 2)
    assert ended.returncode == 0
    assert ended.stderr == "tailor: artifacts/evaluation/predictions.parquet: no such file; not calibrated\n"
    for part in ("many (2)", "few (1)", "ant", "distance from the training prior 0.", "2,000 images, MAP"):
        assert part in ended.stdout
    assert "bee" not in ended.stdout


def test_json_has_every_class_and_the_skipped_files(drift: Drift, logged: Path, release: Release) -> None:
    write_log(logged, release.manifest, drawn(LIVE, 150)[1])
    damaged = log_files(logged)[-1]
    damage(damaged, "truncated")
    ended = drift(logged, "--json", "--method", "em", "--since", "1h", "--samples", 1000)
    found = json.loads(ended.stdout)
    assert (found["version"], found["images"], found["logged"], found["method"]) == (1, 1000, 2000, "em")
    assert [row["class"] for row in found["classes"]] == CLASSES
    for row, truth in zip(found["classes"], LIVE, strict=True):
        assert row["low"] <= row["prior"] <= row["high"]
        assert row["prior"] == row["em"] == pytest.approx(truth, abs=0.08)
    assert found["distance"]["low"] <= total_variation(LIVE, TRAINING) <= found["distance"]["high"]
    assert list(found["skipped"]) == [damaged.name]
    assert (found["written"], found["retrain"], found["calibration"]) == (None, False, None)
    assert f"{damaged.name}: is damaged" in ended.stderr
    assert not Path("artifacts/repository/live_prior.json").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["nowhere"], 2, "nowhere: No such file or directory; start `tailor serve --log-logits FOLDER`"),
        (["artifacts"], 1, "artifacts: holds no logged logits; start `tailor serve --log-logits FOLDER`"),
        (["--repository", "nowhere"], 1, "nowhere: holds no student/config.pbtxt"),
        (["--version", 7], 1, "7/model.onnx: is missing"),
        (["--since", "soon"], 2, "--since is 'soon'; expected a time such as 24h"),
        (["--until", "1d"], 1, "holds 0 images of version 1 in this time; expected at least 100"),
        (["--min-images", 5000], 1, "holds 2,000 images of version 1 in this time; expected at least 5000"),
        (["--samples", 50], 2, "--samples is 50 and --min-images 100; expected at least as many samples as images"),
        (["--fail-above", 2], 2, "--fail-above is 2; expected a distance from 0 to below 1"),
        (["--retrain-above", "nan"], 2, "--retrain-above is nan"),
        (["--calibration", "nowhere.parquet"], 1, "nowhere.parquet: no such file"),
    ],
)
def test_misuse_ends_in_one_line(drift: Drift, arguments: list, status: int, said: str) -> None:
    assert_one_line(drift(*arguments), status, said)


def test_class_maps_have_no_drift_and_no_logs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_segmentation_export(tmp_path / "export")
    root = str(write_repository(tmp_path / "export", tmp_path / "repository"))
    assert main(["drift", "--repository", root]) == 1
    assert "is of task segmentation, whose server logs no logits" in capsys.readouterr().err
    for option in ("--log-logits", "--keep-unknown"):
        assert main(["serve", "--repository", root, option, str(tmp_path / "log")]) == 2
        assert "is of task segmentation, which has neither; omit them" in capsys.readouterr().err
    assert not (tmp_path / "log").exists()


def test_too_few_images_of_a_new_release_are_reported_with_those_of_old_ones(
    drift: Drift, logged: Path, release: Release
) -> None:
    shutil.rmtree(logged)
    write_log(logged, release.manifest, drawn(LIVE, 300)[1], student_sha256="0", version="3")
    assert_one_line(drift(), 1, "holds 0 images of version 1 in this time", "(there are 300 of version 3)")


def test_drift_above_a_threshold_is_a_status(drift: Drift) -> None:
    assert drift("--fail-above", 0.9).returncode == 0
    ended = drift("--fail-above", 0.3)
    assert ended.returncode == 1
    assert "tailor: the distance of the live class prior, 0." in ended.stderr
    assert ended.stderr.endswith("), is above --fail-above 0.3\n")


@pytest.fixture
def tested(own: Path, release: Release) -> Path:
    """Test predictions of the release, enough for a calibration."""
    return calibrated(own, release.manifest)


def calibrated(root: Path, manifest: Manifest, temperature: float = 1.0, images: int = 2000) -> Path:
    """Test predictions in their default location, of the release in the folder's repository."""
    path = root / "artifacts/evaluation/predictions.parquet"
    answered = write_predictions(path, manifest, temperature, images)
    for model in ("student", "classifier"):
        (root / "artifacts/repository" / model / "1/manifest.json").write_text(answered.model_dump_json())
    return path


@pytest.mark.usefixtures("tested")
def test_written_prior_is_whole_and_replaces_the_one_before(drift: Drift) -> None:
    path = Path("artifacts/repository/live_prior.json")
    for method in ("map", "em"):
        assert "live_prior.json" in drift("--write", "--method", method).stdout
        content = json.loads(path.read_text())
        assert content["classes"] == CLASSES
        assert content["estimated"]["method"] == method
        np.testing.assert_allclose(content["prior"], LIVE, atol=0.06)
    assert [entry.name for entry in path.parent.iterdir() if entry.name.startswith(".")] == []


@pytest.mark.usefixtures("tested")
def test_promoted_releases_are_read_and_written_where_the_folder_exists(drift: Drift) -> None:
    shutil.copytree("artifacts/repository", "releases")
    assert drift("--write").returncode == 0
    assert Path("releases/live_prior.json").is_file()
    assert not Path("artifacts/repository/live_prior.json").exists()
    assert drift("--write", "--repository", "artifacts/repository").returncode == 0
    assert Path("artifacts/repository/live_prior.json").is_file()


def test_calibration_of_this_release_is_used_by_default_and_of_another_is_not(drift: Drift, release: Release) -> None:
    path = Path("artifacts/evaluation/predictions.parquet")
    write_predictions(path, release.manifest, 2.0)
    ended = drift("--json")
    assert json.loads(ended.stdout)["calibration"] is None
    assert "predictions.parquet: is of another student than version 1; not calibrated" in ended.stderr
    assert_one_line(drift("--calibration", path), 1, "is of another student than version 1")
    calibrated(Path.cwd(), release.manifest, 2.0)
    found = json.loads(drift("--json").stdout)["calibration"]
    tested = {"test_images": 2000, "too_few_test_images": False}
    assert found == {"file": str(path), "temperature": pytest.approx(2, rel=0.15)} | tested
    assert drift("--write").returncode == 0


def test_a_live_prior_is_not_written_from_a_calibration_of_too_few_test_images(drift: Drift, release: Release) -> None:
    calibrated(Path.cwd(), release.manifest, 2.0, images=40)
    ended = drift("--json")
    assert ended.returncode == 0 and "the calibration rests on 40 test images" in ended.stderr
    assert json.loads(ended.stdout)["calibration"]["too_few_test_images"] is True
    assert_one_line(drift("--write"), 1, "no live prior is written, because its calibration rests on 40 test images")
    assert not Path("artifacts/repository/live_prior.json").exists()


def test_a_live_prior_is_not_written_without_a_calibration(drift: Drift, release: Release) -> None:
    path, live = Path("artifacts/evaluation/predictions.parquet"), Path("artifacts/repository/live_prior.json")
    without = "no live prior is written without a calibration: give --calibration FILE"
    assert_one_line(drift("--write"), 1, f"{path}: no such file; {without}")
    write_predictions(path, release.manifest, 2.0)
    assert_one_line(drift("--write"), 1, f"{path}: is of another student than version 1; {without}")
    assert not live.exists()
    moved = calibrated(Path.cwd(), release.manifest).rename("answers.parquet")
    assert drift("--write", "--calibration", moved).returncode == 0
    assert live.is_file()


def pull(reason: str) -> str:
    """Entry point in place of a retraining."""
    Path("told").write_text(reason)
    return "asked for"


def test_retraining_calls_the_entry_point_with_the_reason(drift: Drift, monkeypatch: pytest.MonkeyPatch) -> None:
    def install(*values: str) -> None:
        found = [EntryPoint("retrain", value, TRIGGERS) for value in values]
        monkeypatch.setattr(
            command, "entry_points", lambda **wanted: found if wanted == {"group": TRIGGERS, "name": "retrain"} else []
        )

    install(f"{__name__}:pull")
    assert drift("--retrain-above", 0.9).returncode == 0
    assert not Path("told").exists()
    ended = drift("--retrain-above", 0.3)
    assert ended.returncode == 0
    assert Path("told").read_text().startswith("distance of the live class prior 0.")
    assert Path("told").read_text().endswith("is above 0.3")
    assert "tailor: starting a retraining: distance" in ended.stderr
    assert ended.stderr.endswith("tailor: asked for\n")
    for values, said in (
        ((), "no package that can retrain is installed; run `pip install -e '.[pipeline]'`"),
        (("package_of_nowhere:trigger",), "package_of_nowhere:trigger cannot be used"),
        ((f"{__name__}:push",), f"{__name__}:push cannot be used"),
    ):
        install(*values)
        assert_one_line(drift("--retrain-above", 0.3), 1, f"--retrain-above: {said}")


@pytest.fixture
def serving(own: Path, release: Release) -> Iterator[str]:
    """The HTTP URL of `tailor serve` that logs every prediction; with test predictions of its release."""
    calibrated(own, release.manifest)
    options = ["--log-logits", "artifacts/logits", "--log-share", "1", "--log-limit", "2MiB", "--quiet"]
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "serving.commands", "serve", *options, *ports],
        cwd=own,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process.stdout.readline().split()[1]
    process.terminate()
    process.communicate(timeout=60)


@pytest.mark.end_to_end
def test_from_the_real_servers_log_to_the_prior_of_its_next_answer(
    own: Path, release: Release, serving: str, tailor: Tailor
) -> None:
    """serve --log-logits, requests, drift --write, predict --prior live: no manual step and no reload."""
    root, log = own / "artifacts/repository", own / "artifacts/logits"
    with Client(serving) as client:
        client.predict([picture(seed) for seed in range(3, 303)], "train")
    (own / "a.png").write_bytes(picture(3))
    refused = tailor("predict", "a.png", "--prior", "live", "--url", serving)
    assert_one_line(refused, 1, "prior is live, but this repository has none; run `tailor drift --write`")
    deadline = time.monotonic() + 60
    while logged_by_now(log, release.manifest) < 300:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    written = tailor("drift", "--write")
    assert written.returncode == 0, written.stderr
    prior = json.loads((root / "live_prior.json").read_text())["prior"]
    ended = tailor("predict", "a.png", "--prior", "live", "--url", serving, "--json")
    answered = [row["probability"] for row in json.loads(ended.stdout)[0]["predictions"]]
    expected = np.sort(release.probabilities([picture(3)], np.log(prior))[0])[::-1][: len(answered)]
    np.testing.assert_allclose(answered, expected, rtol=1e-3)
    logits = release.logits([picture(seed) for seed in range(3, 303)])
    given = find_releases(root, hashes=False)[-1].manifest
    calibration = calibration_from(own / "artifacts/evaluation/predictions.parquet", given)
    direct = estimate_drift(logits, COUNTS, calibration, resamples=2).prior
    np.testing.assert_allclose(prior, direct, atol=1e-3)


def logged_by_now(log: Path, manifest: Manifest) -> int:
    """Return the number of rows in a log."""
    return read_logits(log, manifest).in_window if log.is_dir() and log_files(log) else 0

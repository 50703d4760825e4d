"""Drift: reading logged logits, estimating the live class prior with intervals, writing it, starting a retraining."""

from __future__ import annotations

import json
import os
import re
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
import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import CLASSES, COUNTS, Release, picture

import serving.commands.drift as command
from models.label_shift import total_variation
from models.prior import softmax
from serving.client.sync_client import Client
from serving.commands import main
from serving.commands.drift import TRIGGERS
from serving.drift.calibration import calibration_from
from serving.drift.estimate import estimate_drift
from serving.drift.logged_logits import parse_time, read_logits
from serving.repository.manifest import Manifest
from serving.repository.release import find_releases
from serving.shared.errors import InputError, ServingError
from serving.triton.logit_log import log_files
from tests.support.logit_logs import write_log
from tests.support.tailor_command import assert_one_line

Tailor = Callable[..., CompletedProcess[str]]
Drift = Callable[..., "Ended"]
MEANS = 1.5 * np.random.default_rng(0).normal(size=(5, 4))
TRAINING = np.array(COUNTS) / sum(COUNTS)
LIVE = np.array([0.1, 0.1, 0.2, 0.3, 0.3])


def drawn(prior: np.ndarray, samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw labels of Gaussian classes, and exact logits for the balanced prior."""
    random = np.random.default_rng(1000 + seed)  # a seed other than those of sampling and resampling
    labels = random.choice(5, samples, p=prior)
    points = MEANS[labels] + random.normal(size=(samples, 4))
    return labels, points @ MEANS.T - (MEANS**2).sum(1) / 2


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


def test_what_was_logged_is_read_back_and_of_too_much_a_fair_sample(logged: Path, release: Release) -> None:
    expected = drawn(LIVE, 2000)[1].astype(np.float32)
    whole = read_logits(logged, release.manifest)
    np.testing.assert_array_equal(whole.logits, expected)
    assert (whole.found, whole.others, whole.skipped) == (2000, {}, {})
    write_log(logged, release.manifest, expected + 100)
    part, again, other = (read_logits(logged, release.manifest, most=300, seed=seed) for seed in (0, 0, 1))
    assert part.found == 4000
    assert part.logits.shape == (300, 5)
    np.testing.assert_array_equal(part.logits, again.logits)
    assert not np.array_equal(part.logits, other.logits)
    assert 100 < (part.logits.max(1) > 70).sum() < 200  # about half from either part


def test_window_of_time_is_half_open_and_moments_are_read(logged: Path, release: Release) -> None:
    times = read_logits(logged, release.manifest).times / 1000
    first, last = float(times.min()), float(times.max())
    assert read_logits(logged, release.manifest, since=first, until=last + 0.001).found == 2000
    assert read_logits(logged, release.manifest, since=last + 0.001).found == 0
    assert read_logits(logged, release.manifest, until=first).found == 0
    assert parse_time("90m", "--since", now=10_000) == 4600
    assert parse_time("2d", "--since", now=0) == -172_800
    assert parse_time("2026-11-24T10:00+00:00", "--since") == 1_795_514_400
    for text in ("1x", "yesterday", "", "1e3h", "9" * 40 + "h"):
        with pytest.raises(InputError, match=r"--until is .*; expected a time such as 24h, 7d or 2026-11-24T10:00"):
            parse_time(text, "--until")


def damage(path: Path, kind: str) -> None:
    """Write an invalid file with a log's name, or a log of another release."""
    whole = path.read_bytes()
    table = pyarrow.parquet.ParquetFile(path).read()
    columns = {name: table[name] for name in table.column_names}
    if kind in ("truncated", "empty", "garbage", "no footer"):
        path.write_bytes(
            {"truncated": whole[:-40], "empty": b"", "garbage": b"PAR1" * 99, "no footer": whole[:400]}[kind]
        )
        return
    if kind == "missing column":
        del columns["time"]
    if kind == "more columns":
        columns["image"] = pa.array([b"x"] * len(table))
    if kind in ("nan", "null"):
        rows = table["logits"].to_pylist()
        rows[7][2] = float("nan") if kind == "nan" else None
        columns["logits"] = pa.array(rows, pa.list_(pa.float32(), 5))
    if kind == "null time":
        columns["time"] = pa.array([None] * len(table), table["time"].type)
    if kind == "another width":
        columns["logits"] = pa.array([[0.0] * 4] * len(table), pa.list_(pa.float32(), 4))
    metadata = dict(table.schema.metadata) | ({b"tailor_logits": b"2"} if kind == "another format" else {})
    metadata |= {b"classes_sha256": b"0"} if kind == "other classes" else {}
    metadata = {} if kind == "foreign" else metadata
    pyarrow.parquet.write_table(pa.table(columns).replace_schema_metadata(metadata), path)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        *((kind, "is damaged") for kind in ("truncated", "empty", "garbage", "no footer", "nan", "null")),
        *((kind, "is damaged") for kind in ("missing column", "more columns", "another width", "null time")),
        ("foreign", "is no log of logits of format 1"),
        ("another format", "is no log of logits of format 1"),
        ("other classes", "is of other classes than version 1"),
    ],
)
def test_file_that_cannot_be_used_is_left_out_by_name_and_the_others_count(
    logged: Path, release: Release, kind: str, said: str
) -> None:
    write_log(logged, release.manifest, drawn(LIVE, 150)[1])
    path = log_files(logged)[-1]
    damage(path, kind)
    (logged / "notes.txt").write_text("not of the log, and passed over")
    found = read_logits(logged, release.manifest)
    assert list(found.skipped) == [path.name]
    assert found.skipped[path.name].startswith(said) and "\n" not in found.skipped[path.name]
    assert found.found == 2000


def test_answers_of_another_release_are_counted_apart_whatever_its_number(logged: Path, release: Release) -> None:
    write_log(logged, release.manifest, drawn(LIVE, 150)[1], student_sha256="another", version="1")
    found = read_logits(logged, release.manifest)
    assert (found.found, found.others) == (2000, {1: 150})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["map", "em"])
@pytest.mark.parametrize("shift", ["none", "uniform", "backward"])
def test_intervals_hold_the_truth_about_as_often_as_they_say(method: str, shift: str) -> None:
    truth = {"none": TRAINING, "uniform": np.full(5, 0.2), "backward": TRAINING[::-1]}[shift]
    apart = float(total_variation(truth, TRAINING))
    classes, distances = [], []
    for seed in range(60):
        found = estimate_drift(drawn(truth, 300, seed)[1], COUNTS, method=method, resamples=100, seed=seed)
        classes.append((found.low <= truth) & (truth <= found.high))
        distances.append(found.distance.low <= apart <= found.distance.high)
    # Rare classes are near 0, where the bootstrap under-covers slightly; the interval of the distance is conservative.
    assert np.mean(classes) > 0.85
    assert np.mean(distances) > 0.95 - 4 * (0.95 * 0.05 / 60) ** 0.5


def test_noise_alone_is_no_drift_although_it_makes_a_distance() -> None:
    alarms = [estimate_drift(drawn(TRAINING, 150, seed)[1], COUNTS, resamples=100).exceeds(0.02) for seed in range(40)]
    assert sum(alarms) <= 2
    assert estimate_drift(drawn(LIVE, 150)[1], COUNTS).exceeds(0.3)


@pytest.mark.parametrize("method", ["map", "em"])
def test_few_images_of_many_classes_are_no_drift_although_they_miss_most_of_them(method: str) -> None:
    counts = np.maximum(1, 1000 * 0.001 ** (np.arange(1000) / 999)).astype(int)
    lows = []
    for seed in range(8):
        labels = np.random.default_rng(1000 + seed).choice(1000, 100, p=counts / counts.sum())
        found = estimate_drift(12 * np.eye(1000)[labels], counts.tolist(), method=method, resamples=20, seed=seed)
        assert found.distance.value > 0.3
        lows.append(found.distance.low)
    assert sum(low > 0.1 for low in lows) <= 1


def test_map_gives_no_class_nothing_and_holds_on_to_training_where_data_are_few() -> None:
    logits = np.log(np.eye(5)[[4] * 10] + 1e-9)
    em, little, much = (
        estimate_drift(logits, COUNTS, method=method, pseudo_samples=pseudo)
        for method, pseudo in (("em", None), ("map", None), ("map", 1000))
    )
    assert em.prior[0] < 1e-6 < little.prior.min()
    assert em.distance.value > little.distance.value > much.distance.value
    assert much.distance.value < 0.02
    np.testing.assert_allclose(little.em, em.prior)


def test_groups_add_up_to_the_classes_and_the_most_shifted_come_first() -> None:
    found = estimate_drift(drawn(LIVE, 500)[1], COUNTS)
    assert list(found.groups) == ["many", "medium", "few"]
    assert sum(share.value for share in found.groups.values()) == pytest.approx(1)
    assert found.groups["few"].value == pytest.approx(found.prior[4])
    changes = np.abs(found.prior - found.training)[found.most_shifted(5)]
    assert (np.diff(changes) <= 0).all()
    assert all(share.low <= share.value <= share.high for share in found.groups.values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "bbse"}, "method is 'bbse'; expected em or map"),
        ({"pseudo_samples": -1}, "pseudo-samples are -1; expected a number of at least 0"),
        ({"pseudo_samples": np.nan}, "pseudo-samples are nan"),
        ({"confidence": 1.0}, "confidence is 1.0; expected a number between 0 and 1"),
        ({"resamples": 1}, "resamples is 1"),
    ],
)
def test_unusable_argument_of_an_estimate_is_named(arguments: dict, said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        estimate_drift(drawn(LIVE, 100)[1], COUNTS, **arguments)


def write_predictions(path: Path, manifest: Manifest, temperature: float = 1.0, images: int = 2000) -> Manifest:
    """Write test predictions in the format of the evaluation, and return the manifest of their release."""
    labels, logits = drawn(np.full(5, 0.2), images, 9)
    logits = logits * temperature
    path.parent.mkdir(parents=True, exist_ok=True)
    column = pa.array(list(logits.astype(np.float32)), pa.list_(pa.float32()))
    pyarrow.parquet.write_table(
        pa.table({"sample_id": list(map(str, labels)), "label": labels, "logits": column}), path
    )
    p = softmax(logits.astype(np.float32).astype(np.float64))
    metrics = {"balanced": {"nll": float(-np.log(p[np.arange(images), labels]).mean())}}
    return manifest.model_copy(update={"metrics": metrics})


def test_logits_too_sure_of_themselves_are_calibrated_by_the_test_answers(release: Release, tmp_path: Path) -> None:
    manifest = write_predictions(tmp_path / "predictions.parquet", release.manifest, 3.0)
    calibration = calibration_from(tmp_path / "predictions.parquet", manifest)
    assert calibration.temperature == pytest.approx(3, rel=0.15)
    logits = 3 * drawn(LIVE, 3000)[1]
    plain, better = (estimate_drift(logits, COUNTS, given, resamples=20) for given in (None, calibration))
    assert total_variation(better.prior, LIVE) < total_variation(plain.prior, LIVE)
    assert better.low[0] <= LIVE[0] <= better.high[0]


def test_test_answers_of_another_student_calibrate_nothing(release: Release, tmp_path: Path) -> None:
    path = tmp_path / "predictions.parquet"
    with pytest.raises(ServingError, match="no such file; run `dvc repro evaluate`, or give --calibration"):
        calibration_from(path, release.manifest)
    manifest = write_predictions(path, release.manifest)
    with pytest.raises(ServingError, match="is of another student than version 1"):
        calibration_from(path, release.manifest)
    more = manifest.model_copy(update={"classes": [*CLASSES, "fox"]})
    with pytest.raises(ServingError, match="is not of the 6 classes of version 1"):
        calibration_from(path, more)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ServingError, match=r"predictions\.parquet: damaged"):
        calibration_from(path, manifest)


def test_command_prints_groups_and_classes_and_says_what_it_rests_on(drift: Drift) -> None:
    ended = drift("--top", 2)
    assert ended.returncode == 0
    assert ended.stderr == "tailor: artifacts/evaluation/predictions.parquet: no such file; not calibrated\n"
    for part in ("many (2)", "few (1)", "ant", "distance from the training prior 0.", "2,000 images, MAP"):
        assert part in ended.stdout
    assert "bee" not in ended.stdout


def test_json_holds_every_class_and_what_was_left_out(drift: Drift, logged: Path, release: Release) -> None:
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


def test_too_few_answers_of_a_new_release_tell_of_the_old_ones(drift: Drift, logged: Path, release: Release) -> None:
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
def test_what_was_promoted_is_looked_at_and_written_to_where_it_is_there(drift: Drift) -> None:
    shutil.copytree("artifacts/repository", "releases")
    assert drift("--write").returncode == 0
    assert Path("releases/live_prior.json").is_file()
    assert not Path("artifacts/repository/live_prior.json").exists()
    assert drift("--write", "--repository", "artifacts/repository").returncode == 0
    assert Path("artifacts/repository/live_prior.json").is_file()


def test_calibration_of_this_release_is_used_unasked_and_of_another_one_is_not(drift: Drift, release: Release) -> None:
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


def test_retraining_is_whatever_the_entry_point_names_and_is_told_why(
    drift: Drift, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert "tailor: retraining, as the distance" in ended.stderr
    assert ended.stderr.endswith("tailor: asked for\n")
    for values, said in (
        ((), "nothing here can retrain; pip install 'tailor[pipeline]'"),
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
    return read_logits(log, manifest).found if log.is_dir() and log_files(log) else 0

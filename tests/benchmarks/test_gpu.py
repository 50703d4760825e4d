"""benchmarks.gpu: every step at a small size on the CPU; failing, killed and slow steps; the folder for the GPU machine."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_encoders, gpu_speed
from models.networks.backbones import build_backbone
from models.networks.cosine_classifier import ImageClassifier
from tests.support.project import ROOT

STEPS = "tests.benchmarks.test_gpu:"


def good(_options):
    yield "speed, images/s", 1234.5, "≥ 8"


def failing(_options):
    yield "before the error", 1.0, ""
    raise ValueError("no such kernel")


def killed(_options):
    yield "before the kill", 2.0, ""
    os.kill(os.getpid(), signal.SIGKILL)


def slow(options):
    yield "before the wait", 3.0, ""
    sleeper = subprocess.Popen(["sleep", "600"])
    (options.work / "sleeper").write_text(str(sleeper.pid))
    time.sleep(600)


def tiny(tmp_path, *words):
    return ["--device", "cpu", "--tiny", "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *words]


def results(tmp_path):
    return json.loads((tmp_path / "out/results.json").read_text())


def is_running(pid):
    try:
        return not re.search(r"^State:\s+[ZX]", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except FileNotFoundError:
        return False


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so after {seconds} seconds; is the machine busy?"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.end_to_end
def test_every_step_runs_at_a_small_size_and_a_second_call_runs_none(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", *tiny(tmp_path, "--minutes", "120")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    log = (tmp_path / "out/log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    records = results(tmp_path)
    assert list(records) == [step.name for step in gpu.STEPS]
    for name, record in records.items():
        assert record["status"] == "done" and record["card"] and "torch 2" in record["versions"], name
        assert record["command"] == f"python -m benchmarks.gpu --device cpu --tiny --only {name}"
        values = [value for _, value, _ in record["figures"]]
        assert values and all(isinstance(value, float | int) or value.strip() for value in values), name
    figures = {name: {figure: value for figure, value, _ in record["figures"]} for name, record in records.items()}
    assert figures["tests"]["tests passed"] + figures["tests"]["tests skipped"] >= 10
    assert figures["engine"]["student epoch: engine over baseline"] > 0
    assert len([figure for figure in figures["kernels"] if re.match(r"\d+\. ", figure)]) == 10
    assert len([figure for figure in figures["encoders"] if "LoRA step" in figure]) == 1
    assert {"gml less balanced softmax, points", "plus less gml, points"} <= set(figures["plankton-32"])
    before = (tmp_path / "out/results.json").read_text()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and "done in" not in again.stdout
    assert (tmp_path / "out/results.json").read_text() == before
    assert (tmp_path / "out/log.txt").read_text() == log
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "results.json", "table.md"]


@pytest.mark.slow
def test_a_step_that_fails_or_is_killed_is_recorded_and_the_next_step_runs(tmp_path, monkeypatch, capfd):
    steps = [gpu.Step(work.__name__, 1, STEPS + work.__name__, "") for work in (failing, killed, good)]
    monkeypatch.setattr(gpu, "STEPS", steps)
    monkeypatch.chdir(ROOT)
    assert gpu.main(tiny(tmp_path)) == 1
    records = results(tmp_path)
    assert [record["status"] for record in records.values()] == ["failed", "failed", "done"]
    assert records["failing"]["error"] == "exit code 1: ValueError: no such kernel"
    assert records["killed"]["error"].startswith("exit code -9")
    assert records["killed"]["figures"] == [["before the kill", 2.0, ""]]
    table = (tmp_path / "out/table.md").read_text()
    assert "| good | speed, images/s | 1,234 | ≥ 8 |" in table and "| failing | failed | exit code 1: Value" in table
    capfd.readouterr()
    assert gpu.main(tiny(tmp_path)) == 1
    assert "failed in" not in capfd.readouterr().out, "finished steps, failed ones too, are not run again"
    assert gpu.main(tiny(tmp_path, "--again", "killed")) == 1
    assert re.findall(r"(\w+): \w+ in", capfd.readouterr().out) == ["killed"]


@pytest.mark.slow
def test_a_stopped_step_keeps_its_figures_and_fails_after_three_times_its_estimate_over_all_calls(
    tmp_path, monkeypatch
):
    folder_of_packs(tmp_path)
    words = ["--device", "cpu", "--data", str(tmp_path), *tiny(tmp_path)[3:]]
    monkeypatch.setattr(gpu, "STEPS", [gpu.Step("slow", 1, STEPS + "slow", "", resumes=True)])
    monkeypatch.chdir(ROOT)
    (tmp_path / "out").mkdir()
    stopped = {"status": "stopped", "seconds": 179.5, "figures": [["earlier", 1.0, ""]], **gpu.machine_of("cpu")}
    stopped["size"] = "--device cpu "
    (tmp_path / "out/results.json").write_text(json.dumps({"slow": stopped}))
    assert gpu.main(words) == 1
    record = results(tmp_path)["slow"]
    assert record["status"] == "failed" and re.fullmatch("took [12].. s, 3 times its estimate", record["error"])
    assert record["figures"][0] == ["earlier", 1.0, ""]
    assert record["command"] == f"python -m benchmarks.gpu --device cpu --data {tmp_path} --only slow"


@pytest.mark.slow
def test_a_step_ends_with_a_call_that_is_killed(tmp_path):
    code = (
        f"from benchmarks import gpu; gpu.STEPS = [gpu.Step('slow', 1, '{STEPS}slow', '')]; gpu.main({tiny(tmp_path)})"
    )
    call = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    sleeper = tmp_path / "work/sleeper"
    wait_until(lambda: sleeper.exists() and sleeper.read_text(), 120)
    call.kill()
    call.wait()
    wait_until(lambda: not is_running(int(sleeper.read_text())), 30)


@pytest.mark.slow
def test_a_step_is_ended_with_its_processes_when_the_minutes_end_and_runs_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "STEPS", [gpu.Step(work.__name__, 1, STEPS + work.__name__, "") for work in (slow, good)])
    monkeypatch.chdir(ROOT)
    assert gpu.main(tiny(tmp_path, "--minutes", "0.5")) == 0
    assert results(tmp_path)["slow"]["status"] == "stopped"
    assert "good: left for the next call" in capfd.readouterr().out
    sleeper = tmp_path / "work/sleeper"
    assert sleeper.exists(), "the step had not started its process after half a minute; is the machine busy?"
    assert not is_running(int(sleeper.read_text()))
    assert results(tmp_path)["slow"]["figures"] == [["before the wait", 3.0, ""]]
    monkeypatch.setattr(gpu, "STEPS", [gpu.Step("slow", 1, STEPS + "good", "")])
    assert gpu.main(tiny(tmp_path)) == 0
    assert results(tmp_path)["slow"]["status"] == "done"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "Traceback\ntorch.AcceleratorError: CUDA error: an illegal memory access\nFor debugging\nCompile with X\n\n",
            "torch.AcceleratorError: CUDA error: an illegal memory access",
        ),
        ("ValueError: first\n\nDuring handling\nAssertionError\n", "AssertionError"),
        ("epoch 1\nKilled\n\n", "Killed"),
        ("", ""),
    ],
)
def test_the_error_of_a_step_is_the_line_that_names_the_last_exception(text, error):
    assert gpu.last_error(text) == error


@pytest.mark.slow
def test_failing_tests_and_a_pytest_that_does_not_start_fail_the_step(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = Namespace(work=tmp_path)
    file = tmp_path / "tests/test_card.py"
    file.parent.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    file.write_text("import pytest\n@pytest.mark.gpu\ndef test_card(): raise ValueError('no card')\n")
    figures = gpu_speed.gpu_tests(options)
    assert next(figures) == ("failure: test_card", "ValueError: no card", "")
    with pytest.raises(RuntimeError, match="pytest ended with exit code 1"):
        list(figures)
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")
    with pytest.raises(RuntimeError, match="pytest ran no test and ended with exit code 4"):
        next(gpu_speed.gpu_tests(options))


def test_a_lora_step_trains_the_updates_and_the_classifier_of_a_network_alone(monkeypatch):
    monkeypatch.setattr(gpu_encoders, "ImageClassifier", lambda *given: made.append(ImageClassifier(*given)) or made[0])
    made = []
    network = build_backbone("timm/resnet10t", 64)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(
                module.weight
            )  # timm starts the last one of a block at 0: no gradient reaches the block
    step = gpu_encoders.lora_step(network, "cpu")
    before = {name: weight.clone() for name, weight in made[0].named_parameters()}
    for _ in range(2):  # the first step changes `up` alone, which starts at 0
        step(torch.randn(2, 3, 64, 64))
    changed = {name for name, weight in made[0].named_parameters() if not torch.equal(weight, before[name])}
    assert "classifier.weight" in changed
    assert any(name.endswith(".down") for name in changed)
    assert changed == {name for name in before if name.endswith((".up", ".down")) or name == "classifier.weight"}


def test_the_plan_prints_every_step_with_its_estimate_and_its_status(tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps({"tests": {"status": "done"}, "engine": {"status": "failed"}}))
    assert gpu.main(["--plan", "--output", str(tmp_path)]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [step.name for step in gpu.STEPS]
    assert "1.0 min  done" in lines[0] and "to run" in lines[1] and "failed" in lines[2]
    rest = sum(step.minutes for step in gpu.STEPS if step.name not in ("tests", "engine"))
    assert total.startswith(f"remaining: {rest:.1f} min")
    # A step that does not resume fits into a call of nine minutes.
    assert all(step.resumes or step.minutes <= 8 for step in gpu.STEPS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu"], "argument --data: missing; expected the folder data that benchmarks/gpu_pack.sh makes"),
        (["--data", "."], "argument --data: . has no cifar10-train.parquet; benchmarks/gpu_pack.sh makes the folder"),
        (["--only", "gml"], "invalid choice: 'gml'"),
        (["--minutes", "0"], "argument --minutes: '0'; expected minutes above 0"),
        (["--minutes", "nan"], "argument --minutes: 'nan'; expected minutes above 0"),
        (["--output", "file/folder"], "file/folder: Not a directory; choose another folder"),
        (["--work", "file"], "file: File exists; choose another folder"),
        (["--output", "cut"], "cut/results.json: is not a file of this command (Expecting"),
        (["--output", "list"], "list/results.json: is not a file of this command (expected an object"),
        (
            ["--output", "cuda"],
            "cuda/results.json: step tests was measured with --device cuda; choose another --output",
        ),
    ],
)
def test_wrong_arguments_are_a_usage_error(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for name, text in {"cut": "{", "list": "[]", "cuda": '{"tests": {"status": "done", "size": ""}}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(text)
    small = [] if {"--data", "--device"} & set(words) else ["--device", "cpu", "--tiny"]
    with pytest.raises(SystemExit) as ended:
        gpu.main([*small, *words])
    *_, last = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and message in last


def folder_of_packs(folder):
    folder.mkdir(exist_ok=True)
    for name in gpu.PACKS:
        (folder / name).write_bytes(bytes(10**6))


@pytest.fixture
def packs(tmp_path):
    """Make image packs of one megabyte, and a `python` whose `pip download` writes one wheel for each version."""
    folder_of_packs(tmp_path / "packs")
    program = tmp_path / "bin/python"
    program.parent.mkdir()
    program.write_text(
        '#!/bin/bash\nwhile [ "$1" != --dest ]; do shift; done\ndest=$2\n'
        'while [ "$1" != --python-version ]; do shift; done\necho "$*" > "$dest/some-cp${2/./}.whl"\n'
    )
    program.chmod(0o755)
    return tmp_path / "packs"


def pack(packs, target):
    environment = {**os.environ, "PATH": f"{target.parent}/bin:{os.environ['PATH']}"}
    command = [ROOT / "benchmarks/gpu_pack.sh", packs, target]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_folder_to_carry_has_the_packs_and_the_wheels_of_three_versions_of_python(packs, tmp_path):
    done = pack(packs, tmp_path / "folder")
    assert done.returncode == 0 and "4 MB, 3 wheels" in done.stdout, done.stderr
    assert sorted(path.name for path in (tmp_path / "folder/data").iterdir()) == sorted(gpu.PACKS)
    wheels = sorted((tmp_path / "folder/wheels").iterdir())
    assert [wheel.name for wheel in wheels] == ["some-cp311.whl", "some-cp312.whl", "some-cp313.whl"]
    assert wheels[0].read_text().rstrip().endswith("pydantic psutil ruamel.yaml hypothesis")
    (tmp_path / "folder/wheels/earlier-1.0.whl").touch()
    again = pack(tmp_path / "folder/data", tmp_path / "folder")
    assert again.returncode == 0 and "4 MB, 3 wheels" in again.stdout, again.stderr


def test_a_folder_above_60_megabytes_and_a_missing_pack_are_errors(packs, tmp_path):
    os.truncate(packs / gpu.PACKS[0], 60 * 10**6)
    done = pack(packs, tmp_path / "folder")
    assert done.returncode == 1 and "is larger than 60 MB" in done.stderr
    (packs / gpu.PACKS[3]).unlink()
    done = pack(packs, tmp_path / "folder")
    assert done.returncode == 2 and "has no plankton-test.parquet" in done.stderr

"""`tailor doctor`: each check in each of its states; a failed check does not prevent the others."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections import namedtuple
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from pipeline.commands import doctor_checks as doctor
from pipeline.commands.doctor_checks import GIB, Limits, examine
from pipeline.commands.doctor_prefect import Finding, api_url, prefect_findings
from tests.support.making import content, write

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def in_a_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    write(Path("params.yaml"), yaml.safe_dump(content()).encode())


def examined(name: str, **options) -> list[Finding]:
    return [found for found in examine(Path("params.yaml"), Path("releases"), **options) if found.name == name]


def a_run(ending: str, ago: timedelta, message: str = "") -> None:
    begun = (datetime.now(UTC) - ago).isoformat()
    content = {"begun": begun, "ended": begun, "because": "a test", "process": 1,
               "outcome": {"ending": ending, "message": message, "version": 2, "evidence": None}}  # fmt: skip
    write(doctor.LAST_RUN, json.dumps(content).encode())


def test_a_fresh_project_has_warnings_with_what_to_do_and_nothing_that_fails():
    found = examine(Path("params.yaml"), Path("releases"))
    states = {finding.name: finding.state for finding in found}
    assert states == {"versions": "ok", "params": "ok", "server": "warning", "champion": "warning",
                      "prefect": "warning", "last run": "warning", "ingest": "ok", "disk": "ok"}  # fmt: skip
    assert all(finding.remedy for finding in found if finding.state != "ok")


def test_a_check_that_cannot_be_made_is_a_finding_and_the_others_are_made():
    write(Path("params.yaml"), b"seed: zero")
    found = examine(Path("params.yaml"), Path("releases"))
    (params,) = [finding for finding in found if finding.name == "params"]
    assert params.state == "failing" and "params.yaml: seed is 'zero'" in params.message
    assert len({finding.name for finding in found}) == 8


@pytest.mark.parametrize(
    ("ending", "ago", "state"),
    [
        ("promoted", timedelta(hours=3), "ok"),
        ("refused", timedelta(hours=3), "ok"),
        ("promoted", timedelta(hours=30), "warning"),
        ("failed", timedelta(hours=3), "failing"),
        ("promoted", timedelta(hours=-3), "warning"),
    ],
)
def test_the_last_runs_age_and_ending_count(ending, ago, state):
    a_run(ending, ago, "the disk was full")
    (found,) = examined("last run", limits=Limits(run_hours=24))
    assert found.state == state and ending in found.message
    assert (ago < timedelta(0)) == ("clock was set back" in found.remedy)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"begun": "yesterday"}'])
def test_a_damaged_record_of_the_last_run_is_failing_and_named(text):
    write(doctor.LAST_RUN, text.encode())
    (found,) = examined("last run")
    assert found.state == "failing" and str(doctor.LAST_RUN) in found.message


@pytest.mark.parametrize(("free", "state"), [(0.5, "failing"), (4.0, "warning"), (6.0, "ok")])
def test_free_disk_is_judged_by_what_a_stage_needs(monkeypatch, free, state):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, int(free * GIB)))
    (found,) = examined("disk")
    assert found.state == state and f"{free:.1f} GiB free" in found.message


def test_what_ingest_left_is_told():
    write(Path("data/quarantine/refused-1/rows.csv"), b"")
    Path("data/.ingest/round").mkdir(parents=True)
    assert [finding.state for finding in examined("ingest")] == ["warning", "warning"]


def test_prefect_is_found_by_the_environment_or_by_the_note_of_the_projects_schedule(monkeypatch):
    assert api_url() is None
    write(Path(".prefect/tailor-server.json"), b'{"url": "http://127.0.0.1:1/api"}')
    assert api_url() == "http://127.0.0.1:1/api"
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:2/api")
    assert api_url() == "http://127.0.0.1:2/api"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def doctor_in_a_process(url: str) -> dict[str, dict[str, str]]:
    """Run the doctor in a separate process (Prefect reads its settings once); return the findings by name."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.commands", "doctor", "--json"],
        env={**os.environ, "PREFECT_API_URL": url, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    found = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == any(finding["state"] == "failing" for finding in found.values())
    return found


@pytest.mark.slow
def test_a_prefect_server_that_does_not_answer_is_failing():
    found = doctor_in_a_process(f"http://127.0.0.1:{free_port()}/api")
    assert found["prefect"]["state"] == "failing" and "does not answer" in found["prefect"]["message"]
    assert "worker" not in found


def test_without_prefect_installed_its_server_is_not_asked(monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    monkeypatch.setattr("pipeline.commands.doctor_prefect.find_spec", lambda _: None)
    (found,) = prefect_findings()
    assert found.state == "warning" and "not installed" in found.message


STEPS = """
import json
from dataclasses import asdict
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from pipeline.commands.doctor_prefect import prefect_findings

@flow
def retrain():
    pass

def look():
    print(json.dumps({found.name: found.state for found in prefect_findings()}))

look()
with get_client(sync_client=True) as client:
    client.create_work_pool(WorkPoolCreate(name="pool", type="process"))
    client.create_deployment(client.create_flow(retrain), "nightly", work_pool_name="pool")
    look()
    client.send_worker_heartbeat("pool", "a-worker", heartbeat_interval_seconds=30)
    look()
"""


@pytest.mark.end_to_end
def test_a_real_prefect_server_its_deployment_and_its_worker_are_told_apart(tmp_path):
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PYTHONPATH": str(Path(__file__).parents[3]),
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--no-ui", "--no-services", "--port", str(port)]
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server,
    ):
        try:
            deadline = time.monotonic() + 180
            while not answers(url):
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.5)
            done = subprocess.run(
                [sys.executable, "-c", STEPS],
                env={**environment, "PREFECT_API_URL": url},
                capture_output=True,
                text=True,
                check=True,
            )
        finally:
            server.terminate()
    assert [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")] == [
        {"prefect": "ok", "worker": state} for state in ("warning", "failing", "ok")
    ]


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as response:
            return response.status == 200
    except OSError:
        return False

"""`tailor doctor`: each check in each of its states; a failed check does not prevent the others."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import namedtuple
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from pipeline.doctor.checks import GIB, LAST_RUN, Limits, examine
from pipeline.doctor.prefect import Finding, api_url, prefect_findings
from pipeline.scheduling.prefect_server import is_healthy
from tests.support.making import content, write

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def in_a_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    write(Path("params.yaml"), yaml.safe_dump(content()).encode())


def findings_of(name: str, **options) -> list[Finding]:
    findings = examine(Path("params.yaml"), Path("releases"), **options)
    return [finding for finding in findings if finding.name == name]


def write_last_run(ending: str, ago: timedelta, message: str = "") -> None:
    begun = (datetime.now(UTC) - ago).isoformat()
    content = {"begun": begun, "ended": begun, "because": "a test", "process": 1,
               "outcome": {"ending": ending, "message": message, "version": 2, "evidence": None}}  # fmt: skip
    write(LAST_RUN, json.dumps(content).encode())


def test_a_fresh_project_has_warnings_with_remedies_and_no_failure():
    findings = examine(Path("params.yaml"), Path("releases"))
    states = {finding.name: finding.state for finding in findings}
    assert states == {"versions": "ok", "params": "ok", "server": "warning", "champion": "warning",
                      "prefect": "warning", "last run": "warning", "ingest": "ok", "disk": "ok"}  # fmt: skip
    assert all(finding.remedy for finding in findings if finding.state != "ok")


def test_the_error_of_a_check_is_a_finding_and_the_other_checks_run():
    write(Path("params.yaml"), b"seed: zero")
    findings = examine(Path("params.yaml"), Path("releases"))
    (params,) = [finding for finding in findings if finding.name == "params"]
    assert params.state == "failing" and "params.yaml: seed is 'zero'" in params.message
    assert len({finding.name for finding in findings}) == 8


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
def test_the_last_run_is_checked_by_age_and_ending(ending, ago, state):
    write_last_run(ending, ago, "the disk was full")
    (finding,) = findings_of("last run", limits=Limits(run_hours=24))
    assert finding.state == state and ending in finding.message
    assert (ago < timedelta(0)) == ("clock was set back" in finding.remedy)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"begun": "yesterday"}'])
def test_a_damaged_record_of_the_last_run_is_failing(text):
    write(LAST_RUN, text.encode())
    (finding,) = findings_of("last run")
    assert finding.state == "failing" and str(LAST_RUN) in finding.message


@pytest.mark.parametrize(("free", "state"), [(0.5, "failing"), (4.0, "warning"), (6.0, "ok")])
def test_free_disk_space_is_compared_with_both_limits(monkeypatch, free, state):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, int(free * GIB)))
    (finding,) = findings_of("disk")
    assert finding.state == state and f"{free:.1f} GiB free" in finding.message


def test_an_interrupted_ingest_and_a_refused_drop_are_warnings():
    write(Path("data/quarantine/refused-1/rows.csv"), b"")
    Path("data/.ingest/round").mkdir(parents=True)
    assert [finding.state for finding in findings_of("ingest")] == ["warning", "warning"]


def test_the_api_url_is_that_of_the_environment_or_of_the_projects_schedule(monkeypatch):
    assert api_url() is None
    write(Path(".prefect/tailor-server.json"), b'{"url": "http://127.0.0.1:1/api"}')
    assert api_url() == "http://127.0.0.1:1/api"
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:2/api")
    assert api_url() == "http://127.0.0.1:2/api"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_doctor(url: str) -> dict[str, dict[str, str]]:
    """Run the doctor in a separate process (Prefect reads its settings once); return the findings by name."""
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.commands", "doctor", "--json"],
        env={**os.environ, "PREFECT_API_URL": url, "PYTHONPATH": str(Path(__file__).parents[3])},
        capture_output=True,
        text=True,
        check=False,
    )
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)}
    assert done.returncode == any(finding["state"] == "failing" for finding in findings.values())
    return findings


@pytest.mark.slow
def test_an_unreachable_prefect_server_is_failing():
    findings = run_doctor(f"http://127.0.0.1:{free_port()}/api")
    assert findings["prefect"]["state"] == "failing" and "does not respond" in findings["prefect"]["message"]
    assert "worker" not in findings


def test_without_prefect_its_server_is_not_checked(monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    monkeypatch.setitem(sys.modules, "prefect", None)  # as if it were not installed
    (finding,) = prefect_findings()
    assert finding.state == "warning" and "not installed" in finding.message


STEPS = """
import json
from dataclasses import asdict
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from pipeline.doctor.prefect import prefect_findings

@flow
def retrain():
    pass

def print_findings():
    print(json.dumps({finding.name: finding.state for finding in prefect_findings()}))

print_findings()
with get_client(sync_client=True) as client:
    client.create_work_pool(WorkPoolCreate(name="pool", type="process"))
    client.create_deployment(client.create_flow(retrain), "nightly", work_pool_name="pool")
    print_findings()
    client.send_worker_heartbeat("pool", "a-worker", heartbeat_interval_seconds=30)
    print_findings()
"""


@pytest.mark.end_to_end
def test_the_states_of_a_real_prefect_server_its_deployment_and_worker(tmp_path):
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
            while not is_healthy(url):
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

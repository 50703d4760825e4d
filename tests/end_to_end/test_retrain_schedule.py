"""`tailor schedule` with a real Prefect server: it survives a restart, and one run replaces the missed runs."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
import time
from datetime import UTC, datetime, timedelta

import psutil
import pytest

from pipeline.scheduling.prefect_server import PrefectServer
from tests.support.retraining import ROOT, Retraining

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("retrain_schedule"), pytest.mark.timeout(1800)]

WITHIN = 120.0  # timeout in seconds, for a busy machine
MISSED = 3  # number of future runs that Prefect schedules


class Schedule:
    """A running `tailor schedule`, and its output."""

    def __init__(self, project: Retraining) -> None:
        self.project = project
        self.log = project.root / "schedule.log"
        with self.log.open("a") as log:
            self.process = project.start_into(
                log, "schedule", "--cron", "0 3 * * *", "--timezone", "UTC", "--port", "0"
            )

    def await_line(self, line: str, count: int = 1) -> None:
        deadline = time.monotonic() + WITHIN
        while self.log.read_text().count(line) < count:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def kill_prefect(self) -> None:
        """Send SIGKILL to Prefect's server."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if "server" in process.cmdline() and "start" in process.cmdline():
                process.kill()

    def end(self) -> None:
        """Send SIGTERM; all processes that it started must exit too."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(120) == 0, self.log.read_text()
        _, alive = psutil.wait_procs(children, timeout=30)
        assert [process.cmdline() for process in alive] == []


def database(project: Retraining):
    return sqlite3.connect(project.root / ".prefect" / "prefect.db", timeout=60)


def states(project: Retraining) -> list[str]:
    """Return the state names of the runs whose scheduled time has passed, ordered by time."""
    with database(project) as base:
        now = datetime.now(UTC).strftime("%F %T")
        query = "select state_name from flow_run where expected_start_time < ? order by expected_start_time"
        return [name for (name,) in base.execute(query, (now,))]


@pytest.mark.faults
@pytest.mark.fault_case("prefect-exits-under-schedule", "schedule-restarted", "schedule-down")
def test_a_schedule_survives_restarts_and_replaces_missed_runs_by_one(tmp_path):
    project = Retraining(tmp_path / "project")
    project.prepare("first", 1, 0.6)
    project.choose("first")
    schedule = Schedule(project)
    schedule.await_line("retrains at '0 3 * * *' (UTC)")
    schedule.kill_prefect()
    schedule.await_line("Prefect's server exited unexpectedly and is restarted")
    deadline = time.monotonic() + WITHIN
    while True:  # until Prefect has scheduled the runs of the coming days
        with database(project) as base:
            (scheduled,) = base.execute("select count(*) from flow_run where state_type = 'SCHEDULED'").fetchone()
        if scheduled >= MISSED:
            break
        assert time.monotonic() < deadline, schedule.log.read_text()
        time.sleep(0.5)
    schedule.end()
    # Simulate days without a running schedule: move the first runs into the past.
    with database(project) as base:
        query = "select id, state_id from flow_run where state_type = 'SCHEDULED' order by expected_start_time limit ?"
        for number, (run, state) in enumerate(base.execute(query, (MISSED,)).fetchall()):
            moment = datetime.now(UTC) - timedelta(days=MISSED - number)
            base.execute(
                "update flow_run set expected_start_time = ?1, next_scheduled_start_time = ?1 where id = ?2",
                (moment.strftime("%F %T.%f"), run),
            )
            # The state contains the time too: Prefect uses it to delay a run that starts too early.
            details = "json_set(state_details, '$.scheduled_time', ?)"
            base.execute(
                f"update flow_run_state set state_details = {details} where id = ?", (moment.isoformat(), state)
            )
    schedule = Schedule(project)
    schedule.await_line(f"{MISSED} runs were missed")
    schedule.await_line("Finished in state Promoted")
    # A request for a run returns without waiting for its end.
    program = "from pipeline.scheduling.trigger import trigger_retrain; print(trigger_retrain('drift'))"
    assert "requested a retraining from the schedule" in project.run(sys.executable, "-c", program).stdout
    schedule.await_line("Finished in state Unchanged")
    deadline = time.monotonic() + WITHIN
    while "Unchanged" not in states(project) and time.monotonic() < deadline:
        time.sleep(0.5)
    run_states = states(project)
    schedule.end()
    assert run_states == ["Cancelled"] * (MISSED - 1) + ["Promoted", "Unchanged"], schedule.log.read_text()
    assert json.loads((project.root / "artifacts/retrain/last.json").read_text())["because"] == "drift"
    assert project.repository.is_dir()


@pytest.mark.faults
def test_the_deployments_of_prefect_yaml_can_be_created(tmp_path):
    from prefect.client.schemas.actions import WorkPoolCreate

    project = Retraining(tmp_path / "project")
    (project.root / "prefect.yaml").write_bytes((ROOT / "prefect.yaml").read_bytes())
    (project.root / "pipeline").symlink_to(ROOT / "pipeline")
    with PrefectServer(project.root / ".prefect", scheduling=False) as server:
        project.environment |= {"PREFECT_API_URL": server.api_url, "TAILOR_PROJECT": str(project.root)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PREFECT_API_URL", server.api_url)
            from prefect.client.orchestration import get_client
            from prefect.settings import PREFECT_API_URL, temporary_settings

            with temporary_settings({PREFECT_API_URL: server.api_url}), get_client(sync_client=True) as client:
                for kind in ("process", "kubernetes"):
                    client.create_work_pool(WorkPoolCreate(name=f"tailor-{kind}", type=kind))
                project.run("prefect", "--no-prompt", "deploy", "--all")
                deployments = {deployment.name: deployment for deployment in client.read_deployments()}
    assert set(deployments) == {"process", "kubernetes"}
    for name, deployment in deployments.items():
        assert deployment.entrypoint == "pipeline/flows/retraining.py:retrain"
        assert deployment.work_pool_name == f"tailor-{name}"
        assert deployment.schedules[0].schedule.cron == "0 3 * * *"
        assert deployment.global_concurrency_limit.limit == 1
    assert deployments["kubernetes"].job_variables["image"] == "tailor-train:0.1.0"
    steps = deployments["process"].pull_steps[0]["prefect.deployments.steps.set_working_directory"]
    assert steps["directory"] == str(project.root)


def test_the_environment_of_a_schedule_disables_telemetry(tmp_path, monkeypatch):
    from pipeline.scheduling.prefect_server import set_prefect_env

    for name in ("PREFECT_HOME", "PREFECT_SERVER_ANALYTICS_ENABLED", "DO_NOT_TRACK"):
        monkeypatch.delenv(name, raising=False)
    set_prefect_env(tmp_path)
    assert os.environ["PREFECT_HOME"] == str(tmp_path)
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false" and os.environ["DO_NOT_TRACK"] == "1"

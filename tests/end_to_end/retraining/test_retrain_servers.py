"""Retraining while Triton is killed or Prefect's server stops, and with servers that the run starts itself."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import psutil
import pytest

from serving.client.sync_client import Client
from serving.repository.release import list_versions
from serving.server.supervisor import Supervisor
from tests.end_to_end.retraining.conftest import GOOD, champion_of, leftovers
from tests.serving.conftest import picture
from tests.support.retraining import Retraining
from tests.support.retraining_run import WITHIN, Asking, Begun, commands_below, end_of_all

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("retrain"), pytest.mark.timeout(1800)]


@pytest.mark.faults
@pytest.mark.parametrize(("model", "seed"), [("student", 5), ("classifier", 6)])
@pytest.mark.fault_case("triton-killed-during-load")
def test_triton_killed_while_a_version_loads_is_restarted_and_loads_it(project, context, server, model, seed):
    before = champion_of(project)
    project.prepare(f"with-{model}", seed, GOOD)
    project.choose(f"with-{model}")
    project.set("retrain", retries=6, retry_seconds=1.0)
    reports: list[str] = []
    stopped = threading.Event()
    supervision = threading.Thread(target=Supervisor(server, reports.append).run, args=(stopped,))
    supervision.start()
    try:
        with Asking(server) as asking:
            run = Begun(context, project.root)
            run.await_line("promote: starts")
            while (model, before + 1) not in server.process_counts():  # it exists from the start of the load
                assert run.process.is_alive(), run.text()
            os.kill(server.process_id, signal.SIGKILL)
            outcome = run.outcome()
            with Client(server.grpc_url) as client:
                assert client.predict([picture(1)])[0].version == before + 1
    finally:
        stopped.set()
        supervision.join()
        project.set("retrain", retries=0)
    assert outcome.ending == "promoted" and outcome.version == before + 1
    assert f"version {before + 1} answers instead of {before}, at " in outcome.message
    assert f"at {server.grpc_url}" in outcome.message  # and not "once a server starts"
    assert any("ended by itself" in report for report in reports)
    assert set(asking.versions) <= {before, before + 1}


@pytest.mark.faults
@pytest.mark.fault_case("prefect-stops")
def test_a_run_promotes_although_prefects_server_stops(project, context, server, prefect):
    project.prepare("last", 7, GOOD)
    project.choose("last")
    run = Begun(context, project.root)
    run.await_line("export: starts")
    prefect.stop()
    try:
        outcome = run.outcome()
    finally:
        prefect.start()
    assert outcome.ending == "promoted"
    assert "no more reports are sent to Prefect's server" in run.text()
    with Client(server.grpc_url) as client:
        assert client.predict([picture(1)])[0].version == outcome.version


@pytest.mark.faults
@pytest.mark.fault_case("killed-between-tasks")
def test_the_servers_of_a_killed_run_exit_with_it(tmp_path):
    project = Retraining(tmp_path / "project", rehearsal=True, watch_seconds=1.0, load_seconds=60)
    with (tmp_path / "log").open("w") as log:
        project.prepare("first", 1, 0.6)
        project.choose("first")
        assert project.start_into(log, "retrain").wait(WITHIN) == 0
        project.prepare("second", 2, GOOD)
        project.choose("second")
        run = project.start_into(log, "retrain")
        deadline = time.monotonic() + WITHIN
        while not any("tritonserver" in command for command in commands_below(run.pid)):
            assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.02)
        processes = psutil.Process(run.pid).children(recursive=True)
        assert any("prefect" in command for command in commands_below(run.pid))
        run.kill()
        run.wait()
        end_of_all(processes)
        assert [state.state for state in list_versions(project.repository)] == ["champion", "kept"]
        project.start_into(log, "retrain").wait(WITHIN)
    assert champion_of(project) == 2 and leftovers(project) == []
    record = json.loads((project.root / "artifacts" / "retrain" / "last.json").read_text())
    assert record["outcome"]["ending"] == "promoted" and "on a separate server" in record["outcome"]["message"]

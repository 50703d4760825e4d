"""Fixtures of the retraining tests, which run in order on one project with a real Prefect server and a real Triton.

Each run is `tailor retrain --json` in a process forked from one that has imported Prefect already.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import shutil

import pytest

from pipeline.scheduling.prefect_server import PrefectServer
from serving.repository.release import list_versions
from serving.server.triton_server import TritonServer
from tests.support.retraining import Retraining
from tests.support.retraining_run import Begun

GOOD = 0.9  # accuracy of each challenger that should be promoted


@pytest.fixture(scope="package")
def prefect(tmp_path_factory):
    with PrefectServer(tmp_path_factory.mktemp("prefect"), scheduling=False) as server:
        yield server


@pytest.fixture(scope="package")
def context(prefect, tmp_path_factory):
    """The multiprocessing context from which runs are forked."""
    settings = {
        "PREFECT_API_URL": prefect.api_url,
        "PREFECT_HOME": str(tmp_path_factory.mktemp("home")),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "DVC_NO_ANALYTICS": "1",
        "PREFECT_CLIENT_MAX_RETRIES": "2",
    }
    multiprocessing.forkserver._forkserver._stop()  # a process has one, which keeps the environment that it was started with
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        forkserver = multiprocessing.get_context("forkserver")
        forkserver.set_forkserver_preload(
            [
                "pipeline.flows.retraining",
                "pipeline.scheduling.trigger",
                "pipeline.commands",
                "tests.support.retraining_run",
            ]
        )
        yield forkserver
    multiprocessing.forkserver._forkserver._stop()


@pytest.fixture(scope="package")
def project(prefect, context, tmp_path_factory):
    """A project with its first version promoted."""
    first_project = Retraining(tmp_path_factory.mktemp("retrain") / "project", prefect.api_url)
    first_project.prepare("first", 1, 0.6)
    first_project.choose("first")
    assert Begun(context, first_project.root).outcome().version == 1
    # A test promotes version 1 again, which changes its folder.
    first_project.first = shutil.copytree(
        first_project.repository / "classifier" / "1", tmp_path_factory.mktemp("first") / "1"
    )
    return first_project


@pytest.fixture(scope="package")
def server(project):
    triton = TritonServer(project.repository, http_port=0, grpc_port=0, metrics_port=0).start()
    yield triton
    triton.stop(at_once=True)


def champion_of(project: Retraining) -> int:
    """Return the served version, which is the newest one; independent of the tests that ran before."""
    newest = list_versions(project.repository)[-1]
    assert newest.state == "champion"
    return newest.version


def leftovers(project: Retraining) -> list[str]:
    """Return temporary (hidden) files in the repository, which a finished run must not leave."""
    hidden = [path for model in ("student", "classifier") for path in (project.repository / model).glob(".*")]
    return [str(path) for path in hidden]

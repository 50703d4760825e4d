"""Prefect's pages in a real browser: they work on the port of `tailor schedule --port`, and printed links open them."""

from __future__ import annotations

from pathlib import Path
from uuid import UUID

import pytest
import yaml
from prefect.utilities.urls import url_for

from pipeline.scheduling.prefect_server import PrefectServer, ensure_server, use_api
from tests.support.chromium import needs_chromium, started

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("prefect pages")]

ROOT = Path(__file__).parents[3]
RUN = UUID(int=7)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for Prefect's files; environment variables of Prefect are unset."""
    for name in ("PREFECT_API_URL", "PREFECT_UI_URL", "PREFECT_UI_API_URL", "PREFECT_SERVER_UI_API_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    return tmp_path


@needs_chromium
def test_pages_on_another_port_send_every_request_to_their_own_server(home: Path) -> None:
    with PrefectServer(home) as server, started() as browser:
        assert server.port != 4200
        page = browser.new_page()
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url.removeprefix("blob:")))
        page.goto(server.ui_url)
        page.get_by_text("Run a task or flow to get started").wait_for(timeout=120_000)
        assert any(url.startswith(f"{server.api_url}/flow_runs/") for url in requests)
        assert [url for url in requests if not url.startswith(f"{server.ui_url}/")] == []
        with use_api(server.api_url):
            link = url_for("flow-run", RUN)
        assert link == f"{server.ui_url}/runs/flow-run/{RUN}"


def test_a_run_with_a_temporary_server_logs_no_link(home: Path) -> None:
    with ensure_server(home):
        assert url_for("flow-run", RUN) is None


def test_the_pages_of_compose_send_requests_to_the_published_address() -> None:
    service = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))["services"]["prefect"]
    [published] = service["ports"]
    assert service["environment"]["PREFECT_UI_API_URL"] == f"http://{published.rpartition(':')[0]}/api"

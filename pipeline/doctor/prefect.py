"""Health checks of `tailor doctor` for Prefect: whether its API responds, and whether a worker runs scheduled flows."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from pipeline.scheduling.prefect_server import API_URL, HOME, SERVER_RECORD, set_prefect_env
from pipeline.shared.errors import install_command
from serving.shared.errors import InputError


@dataclass(frozen=True)
class Finding:
    """One line of `tailor doctor`: the name of the check, its state, the result, and the remedy if it is not ok."""

    name: str
    state: Literal["ok", "warning", "failing"]
    message: str
    remedy: str = ""


def api_url() -> str | None:
    """Prefect's API address: PREFECT_API_URL, else that of this project's `tailor schedule` server, else None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return os.environ.get(API_URL) or str(json.loads((HOME / SERVER_RECORD).read_text(encoding="utf-8"))["url"])
    return None


def prefect_findings() -> Iterator[Finding]:
    """Check Prefect's server, then the workers that run its flows."""
    url = api_url()
    if url is None:
        yield Finding("prefect", "warning", f"{API_URL} is not set and no schedule runs here", "tailor schedule --help")
        return
    if find_spec("prefect") is None:
        yield Finding("prefect", "warning", "prefect is not installed, so its server was not checked",
                      install_command("pipeline"))  # fmt: skip
        return
    # Prefect reads these when it is imported; without them it creates a folder in the user's home.
    os.environ[API_URL] = url
    try:
        set_prefect_env()
    except InputError as error:
        yield Finding("prefect", "failing", str(error))
        return
    from httpx import HTTPError
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True, httpx_settings={"timeout": 10.0}) as client:
        error = client.api_healthcheck()
        if error is not None:
            remedy = f"start it (tailor schedule, or prefect server start), or correct {API_URL}"
            yield Finding("prefect", "failing", f"{url}: does not respond ({error})", remedy)
            return
        yield Finding("prefect", "ok", f"{url} responds")
        try:
            yield _worker_finding(client)
        except HTTPError as error:
            message = f"{url}: {' '.join(str(error).split())}"
            yield Finding("worker", "failing", message, "see the log of Prefect's server")


def _worker_finding(client: Any) -> Finding:
    """Check that flow runs are executed: by a served deployment that polls for runs, or an online worker of a pool."""
    online = [
        f"{worker.name} of pool {pool.name}"
        for pool in client.read_work_pools()
        for worker in client.read_workers_for_work_pool(pool.name)
        if _has_status(worker, "ONLINE")
    ]
    deployments = client.read_deployments()
    ready = [deployment.name for deployment in deployments if _has_status(deployment, "READY")]
    if online or ready:
        return Finding("worker", "ok", f"running: {', '.join(online or ready)}")
    if deployments:
        message = f"no worker runs {', '.join(deployment.name for deployment in deployments)}"
        return Finding("worker", "failing", message, "tailor schedule, or prefect worker start --pool NAME")
    return Finding("worker", "warning", "nothing is deployed", "tailor schedule --cron '0 3 * * *', or prefect deploy")


def _has_status(entity: Any, name: str) -> bool:
    return str(getattr(entity.status, "value", entity.status)) == name

"""PromQL expressions of the Grafana dashboard."""

from __future__ import annotations

import json
from pathlib import Path

OBSERVABILITY = Path(__file__).parents[2] / "serving" / "observability"


def expressions() -> list[str]:
    panels = json.loads((OBSERVABILITY / "grafana" / "dashboard.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]

"""Report of benchmarks.serving: a Markdown table of ratios for each kind of comparison."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from benchmarks.machine import gpu_note
from benchmarks.other_work import processor, quiet_ratio
from benchmarks.serving_peers import PEERS, how_to_install
from benchmarks.serving_releases import NETWORKS
from benchmarks.serving_sections import Section, Settings
from benchmarks.serving_turns import Record, median, ratios

Results = Mapping[Section, dict[str, Any]]
# Side → the side it is compared with, and the goal of the ratio by network.
LIMITS = {
    "HTTP, batch 1": ("raw", {"resnet32": 0.88, "resnet32-asking": 0.88, "resnet50": 0.97, "resnet50-asking": 0.97}),
    "HTTP, batch 8": ("raw", {"resnet32": 0.97, "resnet32-asking": 0.97}),
    "gRPC, batch 1": ("raw", {"resnet32": 0.78, "resnet32-asking": 0.78, "resnet50": 0.97, "resnet50-asking": 0.97}),
    "classifier": (
        "decode and infer",
        {"resnet32": 0.75, "resnet32-asking": 0.75, "resnet50": 0.95, "resnet50-asking": 0.95},
    ),
}
# Side → the side it is compared with, and the largest allowed cost.
COSTS = {
    "student, strength 1": ("student, strength 0", 0.01),
    "classifier, train": ("classifier, balanced", 0.01),
    "classifier, mixed strengths": ("classifier, balanced", 0.02),
    "classifier, a third with a prior of its own": ("classifier, balanced", 0.02),
}
PEER_GOALS = {("resnet32", peer): 2.5 for peer in ("litserve", "bentoml")}
PEER_GOALS |= {("resnet50", peer): 1.05 for peer in PEERS}
LIMIT_HEADING = (
    "| network | request | images/s | p50 ms | p99 ms | limit images/s | ratio | smallest to largest | goal | generator "
    "| others |\n|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
)
COST_HEADING = (
    "| network | request | images/s | p50 ms | p99 ms | against | cost | smallest to largest | goal | others |\n"
    "|---|---|--:|--:|--:|---|--:|--:|--:|--:|"
)
PEER_HEADING = (
    "| network | peer | its images/s | p50 / p99 ms | Tailor's images/s | p50 / p99 ms | ratio | smallest to largest | goal "
    "| half load, images/s | its p99 ms | Tailor's p99 ms | others |\n|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def report(command: str, settings: Settings, results: Results) -> str:
    """Return the whole report as Markdown."""
    parts = [head(command, settings, results)]
    tables = [
        ("Against raw ONNX Runtime", LIMIT_HEADING, limit_rows(results, settings)),
        ("Against other servers: `student` over HTTP, batch 1", PEER_HEADING, peer_rows(results, settings)),
        ("What a request's prior costs", COST_HEADING, cost_rows(results, settings)),
    ]
    for title, heading, rows in tables:
        if lines := list(rows):
            notes = limit_lines(results) if heading == LIMIT_HEADING else []
            parts += [f"## {title}", "", heading, *lines, *notes, ""]
    on_gpu = "python -m benchmarks.serving --device gpu --only 'limit-*' --output benchmarks/results/serving-gpu.md"
    return "\n".join([*parts, *([gpu_note(on_gpu)] if settings.device == "cpu" else [])])


def head(command: str, settings: Settings, results: Results) -> str:
    """Return the head of the report: command, hardware, versions, and load by other work."""
    records = [record for result in results.values() for record in _records(result)]
    days = sorted({result["started"][:10] for result in results.values()})
    rounds = sorted({result["made_with"]["rounds"] for result in results.values()})
    seconds = sorted(
        {result["made_with"]["seconds"] * NETWORKS[section.network].stretch for section, result in results.items()}
    )
    lines = [
        f"`{command}`",
        "",
        f"{processor()}; Triton 2.51 of nvidia-pytriton {version('nvidia-pytriton')}, onnxruntime {version('onnxruntime')}, "
        f"Python {platform.python_version()}, Linux {platform.release()}. Measured "
        f"{' and '.join(days)}; turns of {_span(seconds)} s, {_span(rounds)} rounds.",
    ]
    if records:
        busy, load = sorted(record["busy"] for record in records), [record["load"] for record in records]
        lines.append(
            f"Other work on the cores, measured before each of the {len(records)} turns: {busy[len(busy) // 2]:.0%} of them in "
            f"the median, {busy[-1]:.0%} at most; load average {min(load):.2f} to {max(load):.2f}, with that of the benchmark. "
            "Columns: others is the largest share of other work during a turn of the row; above "
            f"{settings.others:.0%} no ratio is printed. generator is the load generator's share of all cores."
        )
    return "\n".join([*lines, ""])


def limit_rows(results: Results, settings: Settings) -> Iterator[str]:
    for section, result in results.items():
        for side, (against, goals) in LIMITS.items() if section.kind == "limit" else ():
            if side not in result["turns"]:
                continue
            ours, limit = result["turns"][side], result["turns"][against]
            goal = f"≥ {goals[section.network]:.2f}" if section.network in goals else ""
            name = "`classifier`, HTTP, JPEG" if side == "classifier" else f"`student`, {side}"
            yield (
                f"| {NETWORKS[section.network].name} | {name} | {_speed(ours)} | {_rate(limit)} "
                f"| {_ratio(settings, ours, limit)} | {goal} | {median(ours, 'own'):.1%} | {_others(ours, limit)} |"
            )


def limit_lines(results: Results) -> Iterator[str]:
    """Yield the settings that were tried for the limit, and the best one."""
    for section, result in results.items():
        for limit, search in result.get("limits", {}).items():
            tried = ", ".join(f"{setting}: {rate:,.1f}" for setting, rate in search["tried"].items())
            yield f"\n{NETWORKS[section.network].name}, {limit}: best at {search['best']} (images/s when tried: {tried})."


def cost_rows(results: Results, settings: Settings) -> Iterator[str]:
    for section, result in results.items():
        for side, (against, goal) in COSTS.items() if section.kind == "adjustment" else ():
            ours, plain = result["turns"][side], result["turns"][against]
            costs = [1 - ratio for ratio in ratios(ours, plain)]
            cost = quiet_ratio(f"{statistics.median(costs):.1%}", _most_others(ours, plain), settings.others)
            yield (
                f"| {NETWORKS[section.network].name} | {side} | {_speed(ours)} | {against} | {cost} "
                f"| {min(costs):.1%} to {max(costs):.1%} | ≤ {goal:.0%} | {_others(ours, plain)} |"
            )


def peer_rows(results: Results, settings: Settings) -> Iterator[str]:
    for section, result in results.items():
        if section.kind != "peer":
            continue
        network, peer = NETWORKS[section.network].name, PEERS[section.peer or ""].name
        if "turns" not in result:
            yield f"| {network} | {peer} | not installed: {how_to_install(settings.peers_python)} {'| ' * 11}"
            continue
        theirs, ours, half = result["turns"]["peer"], result["turns"]["Tailor"], result["half"]
        goal = PEER_GOALS.get((section.network, section.peer or ""))
        yield (
            f"| {network} | {peer} {result['version']} | {_rate(theirs)} | {_latency(theirs)} "
            f"| {_rate(ours)} | {_latency(ours)} | {_ratio(settings, ours, theirs)} "
            f"| {f'≥ {goal:g}' if goal else ''} | {result['half_rate']:,.0f} | {median(half['peer'], 'p99'):.1f} "
            f"| {median(half['Tailor'], 'p99'):.1f} | {_others(ours, theirs, *half.values())} |"
        )


def _records(result: dict[str, Any]) -> Iterator[Record]:
    for turns in (result.get("turns", {}), result.get("half", {})):
        for records in turns.values():
            yield from records


def _span(values: list[float]) -> str:
    return f"{values[0]:g}" if values[0] == values[-1] else f"{values[0]:g} to {values[-1]:g}"


def _rate(records: list[Record]) -> str:
    rate = median(records, "rate")
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"


def _speed(records: list[Record]) -> str:
    return f"{_rate(records)} | {median(records, 'p50'):.1f} | {median(records, 'p99'):.1f}"


def _latency(records: list[Record]) -> str:
    return f"{median(records, 'p50'):.1f} / {median(records, 'p99'):.1f}"


def _ratio(settings: Settings, ours: list[Record], against: list[Record]) -> str:
    values = ratios(ours, against)
    middle = quiet_ratio(f"{statistics.median(values):.2f}", _most_others(ours, against), settings.others)
    return f"{middle} | {min(values):.2f} to {max(values):.2f}"


def _others(*sides: list[Record]) -> str:
    return f"{_most_others(*sides):.0%}"


def _most_others(*sides: list[Record]) -> float:
    # Older stored results have no `others`: use `busy`, measured before the turn.
    return max(record.get("others", record["busy"]) for side in sides for record in side)

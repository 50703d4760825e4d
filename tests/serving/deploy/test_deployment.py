"""Deployment files (images, Kubernetes manifests, systemd units, alerts), each validated by its tool or schema."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.utils import canonicalize_name

from serving.repository.signing_keys import TRUSTED_VARIABLE
from tests.support.documented import check_command
from tests.support.requirements import locked
from tests.support.watched import OBSERVABILITY, expressions

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "serving" / "deploy"


def needed(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is missing")
    return path


def checked(*command: object) -> str:
    ended = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def manifests() -> Iterator[dict[str, Any]]:
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        yield from yaml.safe_load_all(path.read_text())


@pytest.mark.slow
def test_alerts_are_valid_and_fire_as_specified() -> None:
    promtool = needed("promtool")
    checked(promtool, "check", "rules", OBSERVABILITY / "alerts.yaml")
    checked(promtool, "test", "rules", OBSERVABILITY / "alerts_test.yaml")
    assert yaml.safe_load((OBSERVABILITY / "prometheus.yaml").read_text())["scrape_configs"][0]["job_name"] == "tailor"


def test_every_query_of_the_dashboard_is_promql(tmp_path: Path) -> None:
    promtool = needed("promtool")
    plain = [re.sub(r"\$__(rate_interval|range)", "5m", text).replace("$instance", ".*") for text in expressions()]
    rules = [{"record": f"query:{place}", "expr": text} for place, text in enumerate(plain)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked(promtool, "check", "rules", tmp_path / "rules.yaml")


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    dashboard = json.loads((OBSERVABILITY / "grafana" / "dashboard.json").read_text())
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    cells = [(x, p["y"]) for p in places for x in range(p["x"], p["x"] + p["w"])]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(places)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "holds no student/config.pbtxt; mount artifacts/repository there"),
        ({"TAILOR_ADMIN_KEY": "short"}, "TAILOR_ADMIN_KEY is too short"),
        ({"TAILOR_ADMIN_KEY": "a key; with others of it"}, "TAILOR_ADMIN_KEY is not usable"),
    ],
)
def test_the_container_entry_rejects_invalid_settings_in_one_line(
    repository: Path, tmp_path: Path, environment: dict[str, str], message: str
) -> None:
    root = repository if environment else tmp_path
    variables = {"PATH": os.environ["PATH"], "TAILOR_REPOSITORY": str(root)} | environment
    ended = subprocess.run([DEPLOY / "entrypoint.sh"], env=variables, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert message in ended.stderr


@pytest.mark.parametrize("options", [[], ["--live"]])
def test_the_health_check_prints_why_no_server_responds(options: list[str]) -> None:
    command = [sys.executable, DEPLOY / "healthcheck.py", *options, "http://127.0.0.1:9", "http://127.0.0.1:9/metrics"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("classifier at http://127.0.0.1:9 does not respond")


def test_only_the_liveness_probe_accepts_a_busy_server_and_timeouts_exceed_those_of_the_check() -> None:
    check = runpy.run_path(str(DEPLOY / "healthcheck.py"))
    deployment = next(manifest for manifest in manifests() if manifest["kind"] == "Deployment")
    triton = deployment["spec"]["template"]["spec"]["containers"][0]
    command = ["python3", "/opt/tailor/healthcheck.py"]
    for probe in ("startupProbe", "readinessProbe"):
        assert triton[probe]["exec"]["command"] == command
        assert triton[probe]["timeoutSeconds"] > check["TIMEOUT"]
    assert triton["livenessProbe"]["exec"]["command"] == [*command, "--live"]
    assert triton["livenessProbe"]["timeoutSeconds"] > check["LIVE_TIMEOUT"] + 3 * check["SHORT_TIMEOUT"]


def test_dockerfile_passes_its_linter() -> None:
    checked(needed("hadolint"), ROOT / "Dockerfile")


def test_the_dockerfile_parses_and_copies_only_existing_files() -> None:
    dockerfile = pytest.importorskip("dockerfile", reason="the parser of Docker's own, package dockerfile")
    commands = dockerfile.parse_file(str(ROOT / "Dockerfile"))
    stages = [command.value[2] for command in commands if command.cmd == "FROM"]
    assert {"train", "serve", "gateway"} <= set(stages)
    for command in commands:
        if command.cmd == "COPY" and not any(flag.startswith("--from") for flag in command.flags):
            assert all((ROOT / source).exists() for source in command.value[:-1]), command.value
    users = [command.value[0] for command in commands if command.cmd == "USER"]
    assert len(users) == 3
    assert all(re.fullmatch(r"[1-9]\d*(:\d+)?", user) for user in users)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train-build", "gateway-config"])
def test_every_package_that_the_command_imports_is_installed_in_its_stage(stage: str) -> None:
    text = (ROOT / "Dockerfile").read_text()
    [lines] = re.findall(rf" AS {stage}\n(.*?)\nFROM ", text, re.DOTALL)
    [lock] = re.findall(r"pip install --require-hashes --no-deps -r (\w+).txt", lines)
    installed = {canonicalize_name(requirement.name) for requirement in locked(lock)}
    code = (
        "import sys, serving.commands; print(*{name.partition('.')[0] for name in sys.modules} - {'models', 'serving'})"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    by_module = metadata.packages_distributions()
    installed |= {"setuptools", "brotli", "ml-dtypes", "grpcio-tools", "defusedxml"}  # optional imports of packages
    missing = {
        name
        for name in ran.stdout.split()
        if name in by_module and installed.isdisjoint(map(canonicalize_name, by_module[name]))
    }
    assert missing == set()


def test_manifests_pass_their_schemas() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="package kubernetes-validate")
    for manifest in manifests():
        if "kustomize" not in manifest["apiVersion"]:
            validator.validate(manifest, "1.34", strict=True)


def test_the_overlay_adds_an_init_container_that_verifies_signatures_before_the_server() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="package kubernetes-validate")
    overlay = yaml.safe_load((DEPLOY / "kubernetes/signed/kustomization.yaml").read_text())
    [patch] = [yaml.safe_load(entry["patch"]) for entry in overlay["patches"]]
    deployment = next(manifest for manifest in manifests() if manifest["kind"] == "Deployment")
    assert (patch["kind"], patch["metadata"]["name"]) == ("Deployment", deployment["metadata"]["name"])
    pod = deployment["spec"]["template"]["spec"]
    pod |= patch["spec"]["template"]["spec"]  # as kustomize merges it: the Deployment has no init containers
    validator.validate(deployment, "1.34", strict=True)
    [container] = pod["initContainers"]
    triton = pod["containers"][0]
    assert container["securityContext"] == triton["securityContext"]
    assert {mount["name"]: mount for mount in container["volumeMounts"]}["repository"] in triton["volumeMounts"]
    check_command(" ".join(container["command"]))
    assert [entry["name"] for entry in container["env"]] == [TRUSTED_VARIABLE]


def test_pods_run_without_privileges_on_a_read_only_file_system() -> None:
    deployment = next(manifest for manifest in manifests() if manifest["kind"] == "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    for container in pod["containers"]:
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["readinessProbe"]
        assert container["livenessProbe"]
        assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}
    kinds = {manifest["kind"] for manifest in manifests()}
    assert {"Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"} <= kinds


def test_compose_publishes_on_loopback_alone_and_drops_rights() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    assert set(services) == {"server", "gateway", "prometheus", "grafana", "prefect"}
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith("./serving") or (ROOT / source).is_file()
    assert "ports" not in services["server"]


def test_compose_passes_its_schema() -> None:
    compose = pytest.importorskip("compose_spec", reason="package compose-spec").PyCompose
    # Docker substitutes variables and merges anchors before it validates the schema.
    text = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", (ROOT / "compose.yaml").read_text())
    content = yaml.safe_load(re.sub(r"\$\{\w+:\?[^}]*\}", "given", text))
    compose.from_yaml(json.dumps(content)).validate()


@pytest.mark.parametrize("name", ["tailor.service", "tailor-gateway.service"])
def test_systemd_units_are_valid(tmp_path: Path, name: str) -> None:
    analyze = needed("systemd-analyze")
    text = (DEPLOY / name).read_text()
    (tmp_path / name).write_text(text.replace("/opt/tailor/bin/tailor", "/bin/true"))
    checked(analyze, "verify", "--man=no", tmp_path / name)

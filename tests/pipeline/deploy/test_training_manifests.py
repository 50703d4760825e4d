"""Kubernetes manifests for distributed training: valid by schema, and with torchrun's rendezvous settings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from tests.support.making import ROOT

FOLDER = ROOT / "pipeline" / "deploy" / "kubernetes"
validator = pytest.importorskip("kubernetes_validate", reason="package kubernetes-validate")


def documents(name: str) -> dict[str, dict[str, Any]]:
    """Return the manifests of a file by kind."""
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8"))}


def replicas() -> dict[str, dict[str, Any]]:
    return documents("pytorchjob.yaml")["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]


def pods() -> dict[str, dict[str, Any]]:
    """Return the pod templates of both kinds of job."""
    job = documents("indexed-job.yaml")["Job"]["spec"]["template"]
    return {"job": job, **{name: replica["template"] for name, replica in replicas().items()}}


def option(arguments: list[str], name: str) -> str:
    (value,) = (text.partition("=")[2] for text in arguments if text.startswith(f"--{name}="))
    return value


def test_the_indexed_job_and_its_service_match_their_schemas():
    for manifest in documents("indexed-job.yaml").values():
        validator.validate(manifest, "1.34", strict=True)


@pytest.mark.parametrize("role", ["Master", "Worker"])
def test_the_pods_of_the_pytorchjob_match_the_schema_of_pods(role):
    # The operator's schema is not available here; the keys besides the replicas are listed below.
    template = copy.deepcopy(replicas()[role]["template"])
    template["spec"]["restartPolicy"] = "Never"  # the operator sets it
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "made"}, "spec": {"template": template}}
    validator.validate(job, "1.34", strict=True)


def test_the_pytorchjob_has_only_keys_of_the_operator():
    manifest = documents("pytorchjob.yaml")["PyTorchJob"]
    assert manifest["apiVersion"] == "kubeflow.org/v1"
    assert set(manifest["spec"]) == {"nprocPerNode", "runPolicy", "pytorchReplicaSpecs"}
    assert manifest["spec"]["nprocPerNode"] == "8"  # a string, by the schema
    assert manifest["spec"]["runPolicy"]["cleanPodPolicy"] in ("Running", "All", "None")
    assert set(replicas()) == {"Master", "Worker"} and replicas()["Master"]["replicas"] == 1
    for replica in replicas().values():
        assert set(replica) == {"replicas", "restartPolicy", "template"}
        assert replica["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        (container,) = replica["template"]["spec"]["containers"]
        assert container["name"] == "pytorch"
        assert container["command"] + container["args"] == ["torchrun", "-m", "pipeline.student"]


def test_the_validator_detects_an_unknown_key():
    manifest = copy.deepcopy(documents("indexed-job.yaml")["Job"])
    manifest["spec"]["completion"] = manifest["spec"].pop("completions")
    with pytest.raises(validator.ValidationError):
        validator.validate(manifest, "1.34", strict=True)


def test_the_pods_of_the_indexed_job_rendezvous_at_the_first_pod():
    manifests = documents("indexed-job.yaml")
    job, service = manifests["Job"], manifests["Service"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    arguments = container["args"]
    host, _, port = option(arguments, "rdzv-endpoint").partition(":")
    # The host name of a pod of an indexed job is <job>-<index> under the Service of its subdomain.
    assert host == f"{job['metadata']['name']}-0.{pod['subdomain']}" and pod["subdomain"] == service["metadata"]["name"]
    assert int(port) == service["spec"]["ports"][0]["port"]
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == job["spec"]["template"]["metadata"]["labels"]
    spec = job["spec"]
    assert spec["completionMode"] == "Indexed"
    assert int(option(arguments, "nnodes")) == spec["completions"] == spec["parallelism"]
    assert option(arguments, "nproc-per-node") == container["resources"]["limits"]["nvidia.com/gpu"]
    (rank,) = (entry for entry in container["env"] if entry["name"] == "NODE_RANK")
    assert "job-completion-index" in rank["valueFrom"]["fieldRef"]["fieldPath"]


@pytest.mark.parametrize("name", ["job", "Master", "Worker"])
def test_pods_run_without_privileges_on_a_read_only_file_system(name):
    pod = pods()[name]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"project": "/work", "shared-memory": "/dev/shm", "scratch": "/tmp"}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}

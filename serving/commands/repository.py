"""`tailor repository`: write the Triton model repository of an export."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from serving.commands.options import REPOSITORY, AsJson, Debug, print_json
from serving.repository.model_config import Placement
from serving.repository.release import instances as count_instances
from serving.repository.version_policy import version_folders
from serving.repository.writer import write_repository
from serving.server.running import find_running
from serving.shared.errors import InputError
from serving.shared.names import STUDENT
from serving.shared.terminal import print

EXPORT = Path("artifacts/export")


DeviceName = StrEnum("DeviceName", ["cpu", "gpu"])
PrecisionName = StrEnum("PrecisionName", ["fp32", "fp16"])  # of TensorRT


def repository(
    device: Annotated[DeviceName, typer.Option(help="Device of the student.")] = DeviceName.cpu,
    export: Annotated[Path, typer.Option(help="Export folder that `dvc repro` wrote.")] = EXPORT,
    output: Annotated[Path, typer.Option(help="Folder of the model repository.")] = REPOSITORY,
    gpus: Annotated[str, typer.Option(help="Numbers of the GPUs, e.g. 0,1; all GPUs if not given.")] = "",
    instances: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Instances of the student, per GPU or in total; by default two on a CPU for graphs up to 128 MB, else one.",
        ),
    ] = None,
    own_network: Annotated[
        bool | None,
        typer.Option(
            "--own-network/--ask-student",
            help="Whether classifier runs the network itself on the local server; by default for graphs up to 128 MB on a CPU.",
        ),
    ] = None,
    tensorrt: Annotated[
        PrecisionName | None,
        typer.Option(help="Run the student with TensorRT, in an NGC container with --device gpu."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace a repository that has several versions or is being served.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write the Triton model repository of an export.

    One tree serves `tailor serve` and NVIDIA's container. The container takes the onnxruntime backend from
    config.pbtxt; the local server runs the same model.onnx in Python. To add a release to a repository, use `tailor
    promote`.
    """
    placement = Placement(
        device.value, _gpu_numbers(gpus), instances, tensorrt.value if tensorrt else None, own_network
    )
    if not replace:
        _check_replaceable(output)
    root = write_repository(export, output, placement)
    if as_json:
        versions = version_folders(root, STUDENT)
        decided = count_instances(root, STUDENT)
        print_json({"repository": str(root), "versions": versions, "device": device.value, "instances": decided})
    else:
        print(f"wrote {root}")


def _gpu_numbers(gpus: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in gpus.split(",")) if gpus else ()
    except ValueError:
        raise InputError(f"--gpus is {gpus!r}; expected numbers separated by commas, e.g. 0,1") from None


def _check_replaceable(root: Path) -> None:
    versions = version_folders(root, STUDENT)
    if len(versions) > 1:
        numbers = ", ".join(map(str, versions))
        raise InputError(
            f"{root}: holds versions {numbers}; use `tailor promote` to add one, or --replace to delete them"
        )
    for server in find_running(root):
        raise InputError(f"{root}: is served at {server.grpc_url}; use `tailor promote`, or --replace")

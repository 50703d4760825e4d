"""Dry run: run the golden requests of releases in ONNX Runtime, without Triton, in a separate process.

It verifies a version where no second server can be started, and detects a faulty graph after a failed server start. The
separate process is needed because a graph can crash the process that runs it, or never finish.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from serving.golden.student_call import StudentCall
from serving.repository.manifest import GOLDEN_NAME
from serving.repository.release import Release, read_release
from serving.shared.errors import RepositoryError, ServingError
from serving.shared.names import STUDENT, image_model
from serving.shared.priority import lower_priority
from serving.shared.process import tailor_environment
from serving.shared.terminal import print

NICENESS = 5  # a champion may serve on the same cores


def dry_run(root: Path, releases: Sequence[Release], timeout: float) -> None:
    """Run the graph of each release once per golden request, on the CPU, and compare the responses.

    timeout: seconds for each release. Raises RepositoryError naming the model if ONNX Runtime rejects it, crashes or
    times out, or if a response is not the golden one.
    """
    for release in releases:
        model = root / STUDENT / str(release.version) / "model.onnx"
        command = [sys.executable, "-P", "-m", "serving.golden.dry_run", str(root), str(release.version)]
        # Without the variable onnxruntime writes a telemetry file into the user's cache folder.
        environment = tailor_environment(os.environ) | {"ORT_DISABLE_TELEMETRY": "1"}
        try:
            ended = subprocess.run(
                command,
                env=environment,
                start_new_session=True,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise RepositoryError(
                f"{model}: ONNX Runtime did not run its golden requests within {timeout:g} s; export again"
            ) from None
        if ended.returncode < 0:
            raise RepositoryError(f"{model}: it crashed ONNX Runtime with signal {-ended.returncode}; export again")
        if ended.returncode:
            raise RepositoryError((ended.stdout or ended.stderr).strip().rpartition("\n")[2])


def run_golden(root: Path, release: Release) -> None:
    """Run the golden requests of one release in this process. Raises RepositoryError naming the model."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # onnxruntime reads it at its import
    import onnxruntime

    path = root / STUDENT / str(release.version) / "model.onnx"
    try:
        calls = [StudentCall(release.manifest, golden) for golden in release.golden]
    except ValueError as error:
        raise RepositoryError(
            f"{root / image_model(root) / str(release.version) / GOLDEN_NAME}: image {error}"
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        outputs = [session.run([call.output], call.inputs)[0][0] for call in calls]
    except Exception as error:  # onnxruntime's exceptions have no other common base class
        reason = " ".join(str(error).split())[:300]
        raise RepositoryError(f"{path}: ONNX Runtime cannot run it: {reason}; export again") from error
    for golden, call, output in zip(release.golden, calls, outputs, strict=True):
        difference = golden.difference(*call.answer(output))
        if difference:
            raise RepositoryError(f"{path}: a golden request is answered wrongly: {difference}; export again")


def main(root: str, version: str) -> int:
    """Run one release at lower priority; prints an error as one line on standard output. Exit status 0 or 1."""
    lower_priority(os.getpid(), NICENESS)
    try:
        run_golden(Path(root), read_release(Path(root), int(version), hashes=False))
    except ServingError as error:
        print(" ".join(str(error).split()))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

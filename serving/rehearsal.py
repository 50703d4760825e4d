"""A challenger tried on a server of its own before the champion's server hears of it.

What a bad version can do there (answer wrongly, fail to load, never finish loading, end the server) touches nobody.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from serving.dry_run import dry_run
from serving.golden import send_whole_batch
from serving.installation import InstallationError, find_installation
from serving.leftovers import new_prefix, runtime_folder
from serving.model_config import CLASSIFIER, LABELS_NAME, STUDENT
from serving.release import read_release
from serving.server import TritonServer
from serving.version_policy import config_paths, serve_versions

NICENESS = 5  # a champion may be serving on the same cores


def rehearse(root: Path, version: int, timeout: float) -> bool:
    """Serve one version of a repository alone, ask its golden requests, stop; nothing of it listens beyond loopback.

    Whether a server could be had: without a local Triton installation the graph is run in ONNX Runtime alone. timeout:
    seconds for the server's start, or for the graph's own run. Raises ServingError with what went wrong.
    """
    try:
        find_installation()
    except InstallationError:
        dry_run(root, [read_release(root, version)], timeout)
        return False
    stage = runtime_folder(new_prefix())
    try:
        for model in (STUDENT, CLASSIFIER):
            for path in config_paths(root, model):
                copy = stage / path.relative_to(root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            (stage / model / str(version)).symlink_to((root / model / str(version)).absolute())
            serve_versions(stage, model, (version,))
        shutil.copyfile(root / STUDENT / LABELS_NAME, stage / STUDENT / LABELS_NAME)
        server = TritonServer(stage, http_port=0, grpc_port=0, metrics_port=0, start_timeout=timeout, niceness=NICENESS)
        try:
            server.start()
            # In the champion's server a whole batch would delay the requests of users.
            send_whole_batch(server.http_url, server.releases[-1], timeout)
        finally:
            server.stop(at_once=True)
        return True
    finally:
        shutil.rmtree(stage, ignore_errors=True)

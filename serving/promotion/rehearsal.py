"""A challenger tried on a server of its own before the champion's server hears of it.

What a bad version can do there (answer wrongly, fail to load, never finish loading, end the server) affects no user.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from serving.golden.dry_run import dry_run
from serving.golden.requests import send_whole_batch
from serving.repository.release import Release
from serving.repository.version_policy import config_paths, serve_versions
from serving.server.installation import InstallationError, find_installation
from serving.server.leftovers import new_prefix, runtime_folder
from serving.server.triton_server import TritonServer
from serving.shared.names import CLASSIFIER, LABELS_NAME, STUDENT

NICENESS = 5  # a champion may be serving on the same cores


def rehearse(root: Path, release: Release, timeout: float) -> bool:
    """Serve one release of a repository alone, send its golden requests, stop; it listens on loopback only.

    Returns whether a server could be started: without a local Triton installation the graph is run in ONNX Runtime alone.
    timeout: seconds for the server's start, or for the graph's own run. Raises ServingError with the fault.
    """
    try:
        find_installation()
    except InstallationError:
        dry_run(root, [release], timeout)
        return False
    stage = runtime_folder(new_prefix())
    try:
        for model in (STUDENT, CLASSIFIER):
            for path in config_paths(root, model):
                copy = stage / path.relative_to(root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            version = str(release.version)
            (stage / model / version).symlink_to((root / model / version).absolute())
            serve_versions(stage, model, (release.version,))
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

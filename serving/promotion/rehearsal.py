"""Rehearsal: verify a challenger on a separate server before the champion's server loads it.

A bad version (wrong responses, a load that fails or hangs, a crash of the server) then affects no user.
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
from serving.shared.names import LABELS_NAME, STUDENT, models_of

NICENESS = 5  # a champion may serve on the same cores; at 10 and above Triton aborted (docs/experiments.md)


def rehearse(root: Path, release: Release, timeout: float) -> bool:
    """Start a server with one release of a repository, send its golden requests and a full batch, stop it.

    The server listens on loopback only. Returns whether a server was started: without a local Triton installation the
    graph is only run in ONNX Runtime. timeout: seconds for the server's start or the dry run. Raises ServingError with
    the fault.
    """
    try:
        find_installation()
    except InstallationError:
        dry_run(root, [release], timeout)
        return False
    folder = runtime_folder(new_prefix())
    try:
        for model in models_of(root):
            for path in config_paths(root, model):
                copy = folder / path.relative_to(root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
            version = str(release.version)
            (folder / model / version).symlink_to((root / model / version).absolute())
            serve_versions(folder, model, (release.version,))
        shutil.copyfile(root / STUDENT / LABELS_NAME, folder / STUDENT / LABELS_NAME)
        ports = dict.fromkeys(("http_port", "grpc_port", "metrics_port"), 0)
        server = TritonServer(folder, **ports, start_timeout=timeout, niceness=NICENESS)
        try:
            server.start()
            # Here and not in the champion's server, where a full batch would delay the requests of users.
            send_whole_batch(server.http_url, server.releases[-1], timeout)
        finally:
            server.stop(at_once=True)
        return True
    finally:
        shutil.rmtree(folder, ignore_errors=True)

"""Swap the champion: change version policies and load models in an order in which no request fails.

At every moment `student` has each version that the other model has, and a server that starts from the policies on
disk serves a verified version. So a swap that is killed midway needs no repair.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from serving.client.sync_client import Client
from serving.golden.requests import check_golden, check_student
from serving.repository.release import Release, read_champion
from serving.repository.version_policy import serve_versions, served_versions
from serving.server.model_control import LoadTimeout, ModelControl
from serving.server.running import RunningServer
from serving.shared.errors import ServingError
from serving.shared.names import STUDENT, image_model, models_of


@dataclass(frozen=True)
class _Policies:
    """The served versions and the champion before a swap, for restoring them.

    model: the name of the model that takes images. images: its versions.
    """

    model: str
    student: tuple[int, ...]
    images: tuple[int, ...]
    champion: Release


def swap(
    repository: Path, release: Release, final: tuple[int, ...], servers: Sequence[RunningServer], timeout: float
) -> None:
    """Make the repository and its servers serve the versions `final`; the highest, `release`, becomes the champion.

    Raises ServingError if a server does not load a version or answers wrongly; the old policies and versions are then
    restored.
    """
    before = _Policies(
        image_model(repository),
        *(served_versions(repository, model) for model in models_of(repository)),
        read_champion(repository),
    )
    with ExitStack() as stack:
        controls = [stack.enter_context(ModelControl(server, timeout)) for server in servers]
        try:
            _apply(repository, release, before, final, controls)
        except BaseException as error:
            try:
                if isinstance(error, LoadTimeout):
                    _end_hanging_loads(release.version, before, controls)
            finally:
                _restore(repository, before, controls)
            raise


def load_served_versions(repository: Path, servers: Sequence[RunningServer], timeout: float) -> None:
    """Load the versions that the repository's policies list, to complete an interrupted swap.

    Triton skips versions that are loaded. Raises ServingError if the champion does not load or answers wrongly.
    """
    release = read_champion(repository)
    for server in servers:
        with ModelControl(server, timeout) as control:
            for model in models_of(repository):
                control.load(model)
            _check_champion(control, release)


def _apply(
    repository: Path, release: Release, before: _Policies, final: tuple[int, ...], controls: Sequence[ModelControl]
) -> None:
    # First unload versions that are neither the champion nor in `final`, so that at most two releases are loaded.
    remaining = tuple(sorted({*before.images} & {*final, before.champion.version}))
    if remaining != before.images:
        serve_versions(repository, before.model, remaining)
        _load(controls, before.model)
    serve_versions(repository, STUDENT, tuple(sorted({*remaining, *final})))
    _load(controls, STUDENT)
    for control in controls:
        check_student(control.server.url, release, control.timeout)
    serve_versions(repository, before.model, final, release.manifest)
    _load(controls, before.model)
    for control in controls:
        _check_champion(control, release)
    serve_versions(repository, STUDENT, final)
    _load(controls, STUDENT)


def _check_champion(control: ModelControl, release: Release) -> None:
    """Send the golden requests and a request without a version, which the release must serve. Raises ServingError."""
    with Client(control.server.url, control.timeout) as client:
        check_golden(client, release)
        answering = client.predict([release.golden[0].image_bytes()], release.golden[0].strength)[0].version
    if answering != release.version:
        raise ServingError(f"{control.server.url}: version {answering} answers, not {release.version}")


def _end_hanging_loads(version: int, before: _Policies, controls: Sequence[ModelControl]) -> None:
    for model, served in ((STUDENT, before.student), (before.model, before.images)):
        for control in controls:
            if version not in served:
                with suppress(ServingError):  # the server does not answer: restore the others anyway
                    control.end_hanging_load(model, version)


def _restore(repository: Path, before: _Policies, controls: Sequence[ModelControl]) -> None:
    """Restore policies and loaded versions; a server that fails keeps its champion, which was never unloaded."""
    serve_versions(repository, STUDENT, tuple(sorted({*before.student, *before.images})))
    serve_versions(repository, before.model, before.images, before.champion.manifest)
    for control in controls:
        with suppress(ServingError):
            for model in (STUDENT, before.model):
                control.load(model)


def _load(controls: Sequence[ModelControl], model: str) -> None:
    for control in controls:
        control.load(model)

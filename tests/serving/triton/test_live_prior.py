"""Named priors of requests: balanced, train, and live from a file that is replaced during requests."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CLASSES, COUNTS, TOP_K, Release, picture, write_export

from serving.client.async_client import AsyncClient
from serving.client.predictions import Prediction
from serving.client.priors import LIVE, parse_prior
from serving.client.requests import RequestSequence
from serving.client.sync_client import Client
from serving.drift.estimate import write_live_prior
from serving.promotion.promotion import promote
from serving.server.triton_server import TritonServer
from serving.shared.atomic import write_file
from serving.shared.errors import InputError, ServingError
from serving.transport.failures import RequestRejected
from serving.triton.live_prior import NAME
from tests.support.running_gateway import running_gateway
from tests.support.stand_in import Response, Tensor, counted, request

PRIOR = [0.1, 0.4, 0.2, 0.05, 0.25]
OTHER = [0.6, 0.1, 0.1, 0.1, 0.1]


def request_with_priors(images: list[bytes], *names: str) -> Response:
    with_priors = request(images)
    with_priors.tensors.append(Tensor("prior", np.array([[name.encode()] for name in names], dtype=np.object_)))
    return with_priors


@pytest.fixture
def live_file(classifier: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The classifier's live-prior file, outside the repository shared with other tests."""
    monkeypatch.setattr(classifier.parser.live_prior, "path", tmp_path / NAME)
    return tmp_path / NAME


def content(**changes: object) -> str:
    return json.dumps({"format": 1, "classes": CLASSES, "prior": PRIOR} | changes)


def test_each_row_has_its_own_prior(classifier: Any, release: Release, live_file: Path) -> None:
    live_file.write_text(content())
    images = [picture(seed) for seed in range(3)]
    [answer] = classifier.execute([request_with_priors(images, "balanced", "train", "live")])
    adjustments = [np.zeros(5), np.log(np.array(COUNTS) / sum(COUNTS)), np.log(PRIOR)]
    for row, (image, adjustment) in enumerate(zip(images, adjustments, strict=True)):
        expected = release.probabilities([image], adjustment)[0]
        np.testing.assert_allclose(answer["probability"][row], np.sort(expected)[::-1][:TOP_K], rtol=1e-4)
    images = counted(classifier.metrics, "tailor_images_total")
    assert (images["balanced",], images["train",], images["live",]) == (1, 1, 1)


def test_unknown_names_and_two_kinds_of_prior_are_rejected(classifier: Any, live_file: Path) -> None:
    live_file.write_text(content())
    batch = [
        request_with_priors([picture(1)], "shop"),
        request_with_priors([picture(1)], "live"),
        request_with_priors([picture(1)] * 2, "live", "live"),
    ]
    batch[2].tensors[-1].array[1, 0] = b"\xff" * 1000
    batch[1].tensors.append(Tensor("strength", np.ones((1, 1), dtype=np.float32)))
    answers = classifier.execute(batch)
    expected = "expected balanced, train, live, a number, or a list in brackets with one number per class"
    assert [answer.error.message() for answer in answers] == [
        f"prior is 'shop'; {expected}",
        "prior excludes strength and target_prior; send one of them",
        "row 1: prior is '" + r"\ufffd" * 40 + f"'; {expected}",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "prior is live, but this repository has none; run `tailor drift --write`"),
        ("{", "prior is live, but live_prior.json is no live prior"),
        ("[" * 100_000, "live_prior.json is no live prior"),
        ("[1]", "live_prior.json is no live prior"),
        (content(format=2), "format is 2, expected 1"),
        (content(classes=CLASSES[::-1]), "live_prior.json is of other classes"),
        (content(prior=PRIOR[1:]), "live_prior.json: target_prior has shape [4]; expected 5 numbers"),
        (content(prior=["1", 0, 0, 0, 0]), "live_prior.json: holds a str, which is not a number"),
        (content(prior=[True, 0, 0, 0, 0]), "live_prior.json: holds a bool, which is not a number"),
        (content(prior=[2, 0, 0, 0, 0]), "live_prior.json: target_prior sums to 2"),
        (content(prior="many"), "live_prior.json: "),
    ],
)
def test_an_invalid_live_prior_fails_only_its_requests_until_it_is_replaced(
    classifier: Any,
    live_file: Path,
    text: str | None,
    message: str,
) -> None:
    if text is not None:
        live_file.write_text(text)
    rejected, answered = classifier.execute(
        [request_with_priors([picture(1)], "live"), request_with_priors([picture(1)], "train")]
    )
    assert message in rejected.error.message()
    assert "\n" not in rejected.error.message()
    assert answered.error is None
    write_file(live_file, content())
    assert classifier.execute([request_with_priors([picture(1)], "live")])[0].error is None
    live_file.unlink()
    assert (
        "this repository has none" in classifier.execute([request_with_priors([picture(1)], "live")])[0].error.message()
    )


def test_live_is_a_name_and_not_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("live").write_text("[1.0]")
    assert parse_prior("live") == LIVE
    with pytest.raises(InputError, match="expected balanced, train, live, a number, or a file"):
        parse_prior("alive")


def assert_same(answers: Iterable[Prediction], expected: list[Prediction]) -> None:
    """Assert equality up to the rounding of a vector to float32 in transport."""
    for answer, reference in zip(answers, expected, strict=True):
        assert (answer.indexes, answer.version) == (reference.indexes, reference.version)
        np.testing.assert_allclose(answer.probabilities, reference.probabilities, rtol=1e-5)


@pytest.fixture(scope="module")
def own_server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A server on a writable repository."""
    root = shutil.copytree(repository, tmp_path_factory.mktemp("live") / "repository")
    with TritonServer(root, http_port=0, grpc_port=0, metrics_port=0) as server:
        yield server


@pytest.mark.end_to_end
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_both_protocols_use_the_live_prior_of_a_real_server(
    own_server: TritonServer, release: Release, protocol: str
) -> None:
    (own_server.repository / NAME).unlink(missing_ok=True)
    images = [picture(seed) for seed in range(20)]  # more than the largest batch
    with Client(own_server.http_url if protocol == "http" else own_server.grpc_url) as client:
        with pytest.raises(
            RequestRejected, match="prior is live, but this repository has none; run `tailor drift --write`"
        ):
            client.predict(images, "live")
        for prior in (PRIOR, OTHER):
            write_live_prior(own_server.repository, release.manifest, np.array(prior), {})
            assert_same(client.predict(images, "live"), client.predict(images, prior))
            assert_same(client.stream(images, "live"), client.predict(images, prior))


@pytest.mark.end_to_end
def test_live_prior_works_through_the_gateway_and_the_async_client(own_server: TritonServer, release: Release) -> None:
    import asyncio

    write_live_prior(own_server.repository, release.manifest, np.array(PRIOR), {})

    async def ask(url: str) -> list:
        async with AsyncClient(url) as client:
            return await client.predict([picture(1)], "live")

    with Client(own_server.http_url) as client:
        expected = client.predict([picture(1)], PRIOR)
    with running_gateway(own_server) as gateway:
        for url in (own_server.http_url, gateway.http_url, gateway.grpc_url):
            assert_same(asyncio.run(ask(url)), expected)


@pytest.mark.end_to_end
def test_a_live_prior_replaced_under_load_is_the_old_or_the_new_one(own_server: TritonServer, release: Release) -> None:
    write_live_prior(own_server.repository, release.manifest, np.array(PRIOR), {})
    with Client(own_server.grpc_url) as client:
        allowed = [client.predict([picture(1)], prior)[0].probabilities for prior in (PRIOR, OTHER)]
    used, faults, stopping = set(), [], threading.Event()

    def ask(url: str) -> None:
        with Client(url) as own:
            while not stopping.is_set():
                probabilities = own.predict([picture(1)], "live")[0].probabilities
                near = [np.allclose(probabilities, one, rtol=1e-4) for one in allowed]
                used.add(near.index(True)) if any(near) else faults.append(probabilities)

    threads = [threading.Thread(target=ask, args=(url,)) for url in (own_server.http_url, own_server.grpc_url) * 2]
    for thread in threads:
        thread.start()
    for index in range(60):
        write_live_prior(own_server.repository, release.manifest, np.array((OTHER, PRIOR)[index % 2]), {})
    stopping.set()
    for thread in threads:
        thread.join()
    assert faults == []
    assert used == {0, 1}


@pytest.mark.end_to_end
def test_live_prior_survives_a_promotion_and_a_restart(
    own_server: TritonServer, release: Release, tmp_path: Path
) -> None:
    write_live_prior(own_server.repository, release.manifest, np.array(PRIOR), {})
    write_export(tmp_path / "export", version=2)
    assert promote(own_server.repository, tmp_path / "export", rehearsal=False).version == 2
    for again in (False, True):
        if again:
            own_server.stop(at_once=True)
            own_server.start()
        with Client(own_server.grpc_url) as client:
            answers = client.predict([picture(1)], "live")
            assert answers[0].version == 2
            assert_same(answers, client.predict([picture(1)], PRIOR))


def test_a_server_without_the_input_prior_is_an_error_before_an_image_is_sent() -> None:
    exchange = RequestSequence("http://old").predict([picture(1)], "live", None)
    next(exchange)
    [call] = exchange.send([{"max_batch_size": 8}])
    assert call.path == "/v2/models/classifier"
    inputs = [{"name": name, "shape": [-1, 1]} for name in ("image", "strength", "target_prior")]
    with pytest.raises(ServingError, match="http://old: classifier has no input `prior`; serve a repository that"):
        exchange.send([{"inputs": inputs}])

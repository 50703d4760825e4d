"""Client and AsyncClient on the real server: every kind of image, streams, and sharing between threads and tasks."""

from __future__ import annotations

import asyncio
import gc
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CLASSES, MAX_BATCH_SIZE, SIZE, Release, encode, picture
from PIL import Image

from serving.client.async_client import AsyncClient
from serving.client.images import image_files, read_image
from serving.client.predictions import Prediction
from serving.client.requests import RequestSequence
from serving.client.sync_client import Client
from serving.server.triton_server import TritonServer
from serving.shared.errors import InputError, ServingError
from serving.transport.failures import RequestRejected
from serving.transport.messages import Answer, Infer, ModelConfig

PIXELS = np.random.default_rng(8).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
VECTOR = [0.05, 0.05, 0.1, 0.3, 0.5]


@pytest.fixture(params=["http", "grpc"])
def url(server: TritonServer, request: pytest.FixtureRequest) -> str:
    return server.http_url if request.param == "http" else server.grpc_url


def predict_async(url: str, images: Any, prior: Any = None, **options: Any) -> list[Prediction]:
    async def run() -> list[Prediction]:
        async with AsyncClient(url, **options) as client:
            return await client.predict(images, prior)

    return asyncio.run(run())


@pytest.mark.end_to_end
@pytest.mark.parametrize("prior", ["balanced", "train", 0.3, None, VECTOR, dict(zip(CLASSES, VECTOR, strict=True))])
def test_async_client_returns_the_same_predictions(url: str, prior: Any) -> None:
    images = [picture(seed) for seed in range(2 * MAX_BATCH_SIZE + 3)]
    with Client(url) as client:
        assert predict_async(url, images, prior) == client.predict(images, prior)


@pytest.mark.end_to_end
def test_every_image_type_gets_the_same_prediction(url: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(encode(PIXELS))
    kinds = [path, str(path), path.read_bytes(), memoryview(path.read_bytes()), Image.fromarray(PIXELS), PIXELS]
    with Client(url) as client:
        answers = client.predict(kinds, "train")
        assert answers == [answers[0]] * len(kinds)
        assert client.predict(np.stack([PIXELS, PIXELS]), "train") == answers[:2]
        assert client.predict([PIXELS[..., 0]]) == client.predict([PIXELS[..., :1]])
    assert predict_async(url, kinds, "train") == answers


def test_a_pillow_image_is_rotated_by_its_exif_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.fromarray(PIXELS[:, :5]).save(stream, "PNG", exif=exif)
    with Image.open(stream) as opened, Image.open(io.BytesIO(read_image(opened))) as sent:
        assert sent.size == (SIZE, 5)
        np.testing.assert_array_equal(np.asarray(sent), np.rot90(PIXELS[:, :5], -1))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("cat.jpg", r"images is a single image; give a list of images: predict\(\[image\]\)"),
        (Path("cat.jpg"), "single image"),
        (b"bytes", "single image"),
        (PIXELS, "single image"),
        (Image.fromarray(PIXELS), "single image"),
        (7, "images is int; expected a list"),
        ([PIXELS / 255], r"image 0: is float64 \[8, 8, 3\]; expected uint8 \[H,W,3\] or \[H,W\], with pixels"),
        ([PIXELS, PIXELS.transpose(2, 0, 1)], r"image 1: is uint8 \[3, 8, 8\]; .* transpose\(1, 2, 0\)"),
        ([PIXELS[:0]], r"image 0: is uint8 \[0, 8, 3\]"),
        ([np.zeros((2, 2, 4), np.uint8)], r"\[2, 2, 4\]"),
        ([np.zeros((1, 500, 3), np.uint8)], "is 500x1, its longer side above"),
        ([3], "image 0: is int; expected a file, bytes, a Pillow image or a numpy array"),
        (["nowhere.png"], "nowhere.png: No such file"),
    ],
)
def test_an_invalid_image_is_rejected_before_a_request(images: Any, message: str) -> None:
    with pytest.raises(InputError, match=message), Client("http://127.0.0.1:9") as client:
        client.predict(images)
    with pytest.raises(InputError, match=message):
        predict_async("http://127.0.0.1:9", images)


@pytest.mark.end_to_end
def test_the_server_rejects_images_that_the_client_did_not_check(url: str) -> None:
    with Client(url) as client:
        with pytest.raises(RequestRejected, match="image is not a JPEG, PNG or WebP image"):
            client.predict([b"nonsense"], check=False)
        with pytest.raises(InputError, match="image 0: has 0 bytes"):
            client.predict([b""], check=False)


@pytest.mark.end_to_end
def test_threads_share_one_client(url: str, release: Release) -> None:
    log_prior = np.array(release.manifest.log_prior)
    with Client(url) as client, ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda seed: client.predict([picture(seed)], seed / 60)[0], range(60)))
    for seed, answer in enumerate(answers):
        expected = release.probabilities([picture(seed)], seed / 60 * log_prior)[0]
        assert answer.indexes[0] == expected.argmax()
        np.testing.assert_allclose(answer.probabilities[0], expected.max(), rtol=1e-4)


@pytest.mark.end_to_end
def test_tasks_share_one_client(url: str) -> None:
    async def run() -> list[list[Prediction]]:
        async with AsyncClient(url) as client:
            return await asyncio.gather(*(client.predict([picture(seed)], seed / 60) for seed in range(60)))

    answers = asyncio.run(run())
    with Client(url) as client:
        assert [answer for [answer] in answers] == [client.predict([picture(seed)], seed / 60)[0] for seed in range(60)]


@pytest.mark.end_to_end
def test_a_stream_keeps_the_order_and_reads_few_images_ahead(url: str) -> None:
    taken = 0

    def source() -> Iterator[bytes]:
        nonlocal taken
        for seed in range(60):
            taken += 1
            yield picture(seed)

    async def run() -> list[Prediction | ServingError]:
        async with AsyncClient(url) as client:
            return [answer async for answer in client.stream(source(), "train", batch=4)]

    with Client(url, concurrency=2) as client:
        expected = client.predict([picture(seed) for seed in range(60)], "train")
        stream = client.stream(source(), "train", batch=4)
        assert next(stream) == expected[0]
        assert taken == 12  # two groups in flight and the one that is awaited
        assert [expected[0], *stream] == expected
    assert asyncio.run(run()) == expected


@pytest.mark.end_to_end
def test_a_stream_with_keep_going_yields_errors_in_order(url: str, tmp_path: Path) -> None:
    # One error that the client detects, and one that only the server detects.
    images = [picture(0), tmp_path / "nowhere.png", picture(1), b"nonsense", picture(2)]

    async def run() -> list[Prediction | ServingError]:
        async with AsyncClient(url) as client:
            return [answer async for answer in client.stream(images, "train", check=False, keep_going=True)]

    with Client(url) as client:
        answers = list(client.stream(images, "train", check=False, keep_going=True))
        good = client.predict([picture(0), picture(1), picture(2)], "train")
        assert answers[::2] == good
        assert isinstance(answers[1], InputError)
        assert isinstance(answers[3], RequestRejected)
        with pytest.raises(InputError, match=r"nowhere\.png"):
            list(client.stream(images, "train", check=False))
    assert list(map(str, asyncio.run(run()))) == list(map(str, answers))


@pytest.mark.end_to_end
def test_async_client_returns_the_same_status_and_class_names(url: str) -> None:
    async def run() -> tuple[Any, list[str]]:
        async with AsyncClient(url) as client:
            return await client.status(), await client.class_names()

    with Client(url) as client:
        assert asyncio.run(run()) == (client.status(), CLASSES)


@pytest.mark.end_to_end
def test_a_cancelled_task_leaves_the_client_usable(url: str) -> None:
    async def run() -> None:
        async with AsyncClient(url) as client:
            task = asyncio.create_task(client.predict([picture(1)] * 800))
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(await client.predict([picture(1)])) == 1

    asyncio.run(run())
    gc.collect()


def test_cached_metadata_is_requested_again_after_a_new_release() -> None:
    def answer(version: int) -> Answer:
        columns = {"class": [[b"ant"]], "index": [[0]], "probability": [[1.0]]}
        return Answer({name: np.array(rows, dtype=object) for name, rows in columns.items()}, version)

    def config(strength: str) -> dict[str, Any]:
        inputs = [{"name": name, "dims": ["1"]} for name in ("image", "strength", "prior")]
        default = {"default_strength": {"string_value": strength}}
        return {"max_batch_size": 8, "input": inputs, "parameters": default}

    sent_calls: list[Any] = []

    def run(sequence: RequestSequence, responses: Iterator[Any]) -> list[Prediction]:
        exchange = sequence.predict([picture(1)], None, None)
        try:
            calls = next(exchange)
            while True:
                sent_calls.extend(calls)
                calls = exchange.send([next(responses)])
        except StopIteration as done:
            return done.value

    sequence = RequestSequence("http://127.0.0.1:8000")
    run(sequence, iter([config("0.5"), answer(1)]))
    run(sequence, iter([answer(1)]))
    last = run(sequence, iter([answer(2), config("1.0"), answer(2)]))
    assert last[0].version == 2
    priors = [call.inputs["prior"].item() for call in sent_calls if isinstance(call, Infer)]
    assert priors == [b"0.5", b"0.5", b"0.5", b"1.0"]
    assert sum(isinstance(call, ModelConfig) for call in sent_calls) == 2


def test_image_files_lists_a_folder_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.JPG", "a/c.png", "a/notes.txt", ".thumbs/d.png", "a/.e.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [str(path.relative_to(tmp_path)) for path in image_files(tmp_path)] == ["a/c.png", "b.JPG"]
    with pytest.raises(InputError, match=r"holds no image; expected files that end in \.jpg"):
        image_files(tmp_path / ".thumbs" / "none")

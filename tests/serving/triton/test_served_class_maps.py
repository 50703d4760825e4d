"""A server of task segmentation: model `segmenter`, from every caller that names the model."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import Release
from PIL import Image

from serving.client.sync_client import Client
from serving.promotion.check import check_promotion
from serving.promotion.lifecycle import servers_of
from serving.promotion.promotion import promote, rollback
from serving.repository.release import list_versions
from serving.server.triton_server import TritonServer
from serving.shared.errors import RepositoryError, ServingError
from tests.support.container import running_container
from tests.support.running_gateway import running_gateway
from tests.support.segmentation_release import CLASSES, segmentation_server, street, write_segmentation_export

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("segmenter")]


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with segmentation_server(tmp_path_factory.mktemp("segmenter")) as running:
        yield running


@pytest.mark.parametrize("protocol", ["http_url", "grpc_url"])
def test_an_image_gets_its_class_map_at_its_own_size_for_each_prior(segmenter: TritonServer, protocol: str) -> None:
    images = [street(24, 16), street(20, 8)]
    with Client(getattr(segmenter, protocol)) as client:
        wide, low = client.segment(images, "balanced")
        assert wide.class_map.shape == (16, 24) and low.class_map.shape == (8, 20)
        assert wide.classes == tuple(CLASSES) and wide.version == 1
        assert (wide.class_map[:4, 14:] == 1).all() and (wide.class_map[12:, 14:] == 2).all()
        assert (wide.class_map[:, :10] == 0).all() and wide.confidence.min() > 0.3
        [trained] = client.segment(images[:1], "train")
        [only] = client.segment(images[:1], {"sign": 1.0})
        [typed] = client.segment(images[:1], [0.0, 1.0, 0.0])
    assert trained.shares()["road"] >= wide.shares()["road"]
    assert only.shares() == {"sign": 1.0} and typed.shares() == {"car & bus": 1.0}


def test_the_models_are_named_segmenter_and_student(segmenter: TritonServer) -> None:
    with Client(segmenter.http_url) as client:
        status = client.status()
        assert client.class_names() == CLASSES
        [prediction] = client.predict([street()])
    assert [(model.name, model.versions) for model in status.models] == [("student", (1,)), ("segmenter", (1,))]
    assert status.answers and prediction.classes[0] == "road"
    assert sorted(path.name for path in segmenter.repository.iterdir() if path.is_dir()) == ["segmenter", "student"]


def test_tailor_segment_writes_the_map_and_the_overlay(
    segmenter: TritonServer, tailor: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "street.png").write_bytes(street(24, 16))
    out, over = tmp_path / "map.png", tmp_path / "overlay.jpg"
    options = ["--prior", "train", "--out", str(out), "--overlay", str(over), "--json", "--url", segmenter.http_url]
    done = tailor("segment", str(tmp_path / "street.png"), *options)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as written:
        shares = np.bincount(np.asarray(written).ravel(), minlength=3) / (24 * 16)
        assert written.mode == "P" and written.size == (24, 16)
    assert json.loads(done.stdout)["shares"] == {CLASSES[i]: shares[i] for i in np.argsort(-shares) if shares[i]}
    assert Image.open(over).size == (24, 16)


def test_a_second_release_is_promoted_and_rolled_back(segmenter: TritonServer, tmp_path: Path) -> None:
    write_segmentation_export(tmp_path / "export", scale=10.0, miou=0.4)
    comparison = check_promotion(segmenter.repository, tmp_path / "export")
    assert comparison.figures["balanced_accuracy"] == (0.5, 0.4) and comparison.figures["few"] == (None, None)
    assert (
        comparison.confirmation_reason == "its mIoU on test images of all classes is 40.0%, below the champion's 50.0%"
    )
    servers = servers_of(segmenter.repository, segmenter.grpc_url)
    assert promote(segmenter.repository, tmp_path / "export", servers=servers).version == 2
    with Client(segmenter.http_url) as client:
        assert client.segment([street()])[0].version == 2 and client.status().models[1].versions == (1, 2)
        rollback(segmenter.repository, servers=servers)
        assert client.segment([street()])[0].version == 1
    assert [state.state for state in list_versions(segmenter.repository)] == ["champion", "kept"]


def test_the_gateway_forwards_class_maps(segmenter: TritonServer) -> None:
    with running_gateway(segmenter) as gateway, Client(gateway.http_url) as client:
        assert client.segment([street()])[0].class_map.shape == (8, 12)
        with Client(gateway.grpc_url) as other:
            assert other.segment([street()], "train")[0].version == 1


def test_the_entry_point_of_a_container_loads_the_segmenter(segmenter: TritonServer, tmp_path: Path) -> None:
    running = running_container(segmenter.repository, tmp_path, "a-key-known-to-the-tests")
    with running as contained, Client(contained.http_url) as client:
        assert client.segment([street()])[0].version == 1


def test_class_maps_of_a_classifier_are_an_error_of_one_line(server: TritonServer) -> None:
    with Client(server.http_url) as client, pytest.raises(ServingError, match="serves no class maps"):
        client.segment([street()])


def test_a_release_of_the_other_task_is_refused(segmenter: TritonServer, release: Release) -> None:
    with pytest.raises(RepositoryError, match=r"is a release of `classifier`, but .* holds `segmenter`"):
        promote(segmenter.repository, release.export_dir, servers=[])

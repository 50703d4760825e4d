"""The command line of serving: output, one-line errors, exit status."""

from __future__ import annotations

import csv
import http.server
import json
import socket
import threading
from pathlib import Path

import pytest
from conftest import CLASSES, TOP_K, Release, picture

from serving.server.triton_server import TritonServer
from serving.shared.version import TAILOR_VERSION, source_commit
from tests.support.bad_files import BAD
from tests.support.faulty_server import FaultyHttp
from tests.support.tailor_command import Tailor, assert_one_line

pytestmark = pytest.mark.slow


@pytest.fixture
def unused_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "a picture.png").write_bytes(picture(3))
    return tmp_path / "a picture.png"


@pytest.mark.parametrize("command", [[], ["serve"], ["predict"], ["status"], ["loadtest"]])
def test_help_has_a_usage_and_an_example(tailor: Tailor, command: list[str]) -> None:
    ended = tailor(*command, "--help")
    assert ended.returncode == 0
    assert "Usage: tailor" in ended.stdout
    assert not command or f"Example: tailor {command[0]}" in ended.stdout


@pytest.mark.end_to_end
def test_predict_prints_a_table(tailor: Tailor, server: TritonServer, image: Path) -> None:
    ended = tailor("predict", image.name, "--url", server.http_url, "--prior", "train", "--top", 2)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "a picture.png" in ended.stdout
    assert sum(name in ended.stdout for name in CLASSES) == 2


@pytest.mark.end_to_end
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_predict_prints_json_that_agrees_with_onnx_runtime(
    tailor: Tailor, server: TritonServer, release: Release, image: Path, protocol: str
) -> None:
    url = server.http_url if protocol == "http" else server.grpc_url
    ended = tailor("predict", image, image, "--url", url, "--protocol", protocol, "--prior", "balanced", "--json")
    answers = json.loads(ended.stdout)
    expected = release.probabilities([picture(3)], 0.0)[0]
    assert [answer["image"] for answer in answers] == [str(image)] * 2
    for answer in answers:
        best = answer["predictions"]
        assert len(best) == TOP_K
        assert best[0]["class"] == CLASSES[int(expected.argmax())]
        assert [row["probability"] for row in best] == pytest.approx(sorted(expected)[::-1][:TOP_K], rel=1e-4)


@pytest.mark.end_to_end
def test_predict_classifies_the_valid_images_of_a_folder_and_names_the_invalid(
    tailor: Tailor, server: TritonServer, release: Release, tmp_path: Path
) -> None:
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name, data in (("a.png", picture(1)), ("b.png", b"nonsense"), ("more/c.png", picture(2)), ("d.txt", b"")):
        (tmp_path / "photos" / name).write_bytes(data)
    ended = tailor("predict", "photos", "--url", server.http_url, "--prior", "balanced", "--top", 1, "--csv")
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [
        "tailor: photos/b.png: is not a JPEG, PNG or WebP image",
        "tailor: 1 of 3 images could not be classified",
    ]
    rows = list(csv.DictReader(ended.stdout.splitlines()))
    assert [row["image"] for row in rows] == ["photos/a.png", "photos/b.png", "photos/more/c.png"]
    assert rows[1]["error"] == "photos/b.png: is not a JPEG, PNG or WebP image"
    for row, expected in zip(rows[::2], release.probabilities([picture(1), picture(2)], 0.0), strict=True):
        assert (row["class"], row["rank"], row["version"]) == (CLASSES[int(expected.argmax())], "1", "1")
        assert float(row["probability"]) == pytest.approx(expected.max(), rel=1e-4)
    content = json.loads(tailor("predict", "photos", "--url", server.grpc_url, "--json").stdout)
    assert [sorted(entry) for entry in content] == [
        ["image", "predictions", "version"],
        ["error", "image"],
        ["image", "predictions", "version"],
    ]


@pytest.mark.end_to_end
def test_predict_sends_the_headers_of_the_options(
    tailor: Tailor, server: TritonServer, image: Path, tmp_path: Path
) -> None:
    (tmp_path / "headers").write_text("X-Secret: from a file\n\nX-More: yes\n")
    with FaultyHttp((server.host, server.ports["--http-port"])) as between:
        ended = tailor("predict", image, "--url", between.url, "--header", "X-Tenant: shop", "--header", "@headers")
        assert (ended.returncode, ended.stderr) == (0, "")
        request = between.requests[0].lower()
    for line in (b"x-tenant: shop", b"x-secret: from a file", b"x-more: yes"):
        assert line in request


@pytest.mark.end_to_end
def test_status_prints_versions(tailor: Tailor, server: TritonServer) -> None:
    ended = tailor("status", "--url", server.grpc_url)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "classifier" in ended.stdout
    assert "answers" in ended.stdout
    content = json.loads(tailor("status", "--url", server.http_url, "--json").stdout)
    assert content["models"] == [{"name": "student", "versions": [1]}, {"name": "classifier", "versions": [1]}]


@pytest.mark.end_to_end
def test_more_classes_than_the_server_returns_is_a_usage_error(
    tailor: Tailor, server: TritonServer, image: Path
) -> None:
    ended = tailor("predict", image, "--url", server.http_url, "--top", 4)
    assert_one_line(ended, 2, "--top is 4; the server returns the best 3")


@pytest.mark.end_to_end
def test_a_prior_of_another_length_is_a_usage_error(
    tailor: Tailor, server: TritonServer, image: Path, tmp_path: Path
) -> None:
    (tmp_path / "prior.json").write_text("[0.5, 0.5]")
    ended = tailor("predict", image, "--url", server.http_url, "--prior", "prior.json")
    assert_one_line(ended, 2, "expected 5 numbers, one per class")


def test_the_error_without_a_server_names_the_command_that_starts_one(
    tailor: Tailor, unused_url: str, image: Path
) -> None:
    for command in (["predict", image], ["status"]):
        for url in (unused_url, unused_url.replace("http", "grpc")):
            ended = tailor(*command, "--url", url, "--timeout", 5)
            assert_one_line(ended, 1, f"no Triton server answers at {url}; start one with `tailor serve`")


def test_another_kind_of_server_is_not_mistaken_for_triton(tailor: Tailor, image: Path) -> None:
    class Quiet(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_arguments: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{other.server_port}"
        assert_one_line(tailor("predict", image, "--url", url), 1, f"no Triton server answers at {url}")
        other.shutdown()


@pytest.mark.parametrize("name", ["huge.png", "text.jpg", "empty.jpg", "truncated.png"])
def test_an_invalid_image_is_a_usage_error_in_one_line(tailor: Tailor, tmp_path: Path, name: str) -> None:
    data, fault = BAD[name]
    (tmp_path / name).write_bytes(data)
    assert_one_line(tailor("predict", name), 2, f"{name}: ", fault)


def test_a_missing_image_and_an_empty_folder_are_usage_errors(tailor: Tailor, tmp_path: Path) -> None:
    assert_one_line(tailor("predict", "nowhere.png"), 2, "nowhere.png: No such file or directory; give a JPEG")
    (tmp_path / "photos").mkdir()
    assert_one_line(tailor("predict", "photos"), 2, "photos: holds no image; expected files that end in .jpg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict"], "Missing argument 'IMAGE...'"),
        (["predict", "a.png", "--top", "0"], "--top"),
        (["predict", "a.png", "--prior", "nan"], "prior is nan"),
        (
            ["predict", "a.png", "--prior", "nowhere.json"],
            "no such file exists; expected balanced, train, live, a number",
        ),
        (["predict", "a.png", "--url", "ftp://x"], "url is 'ftp://x'; expected http://host:port or grpc://host:port"),
        (["predict", "a.png", "--url", "http://x:1", "--protocol", "grpc"], "--protocol is grpc but --url is"),
        (["predict", "a.png", "--timeout", "0"], "timeout is 0"),
        (["serve", "--port", "1"], "No such option: --port"),
        (["serve", "--http-port", "70000"], "--http-port is 70000; expected a port from 1 to 65535"),
        (["serve", "--host", "no.such.host.invalid"], "--host is 'no.such.host.invalid'"),
        (["serve", "--http-port", "7000", "--grpc-port", "7000"], "expected different ports"),
        (["bake"], "No such command 'bake'"),
    ],
)
def test_a_usage_error_is_one_line_with_status_2(tailor: Tailor, arguments: list[str], message: str) -> None:
    assert_one_line(tailor(*arguments), 2, message)


def test_the_error_of_serve_without_a_repository_names_the_commands_that_write_one(tailor: Tailor) -> None:
    ended = tailor("serve", "--http-port", 0, "--grpc-port", 0, "--metrics-port", 0)
    assert_one_line(
        ended, 1, "artifacts/repository: holds no student/config.pbtxt, nothing has been promoted yet; run `dvc repro`"
    )


def test_serve_on_a_port_in_use_names_port_and_option(tailor: Tailor, repository: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ended = tailor("serve", "--repository", repository, "--http-port", port, "--grpc-port", 0, "--metrics-port", 0)
    assert_one_line(ended, 1, f"--http-port {port}: the port is in use on 127.0.0.1")


def test_debug_shows_the_traceback_above_the_line(tailor: Tailor) -> None:
    ended = tailor("predict", "nowhere.png", "--debug")
    assert ended.returncode == 2
    assert ended.stderr.startswith("Traceback")
    assert ended.stderr.splitlines()[-1].startswith("tailor: nowhere.png")


def test_a_number_of_classes_below_1_is_a_usage_error(tailor: Tailor, image: Path) -> None:
    for top in ("0", "-3"):
        assert_one_line(tailor("predict", image, "--top", top), 2, f"--top is {top}; expected at least 1")


def test_a_certificate_without_its_key_is_a_usage_error(tailor: Tailor) -> None:
    message = "is given alone; expected --grpc-tls-cert and --grpc-tls-key together"
    for option in ("--grpc-tls-cert", "--grpc-tls-key"):
        assert_one_line(tailor("serve", option, "tls.pem"), 2, f"{option} {message}")
    assert_one_line(
        tailor("serve", "--grpc-tls-cert", "no.crt", "--grpc-tls-key", "no.key"),
        2,
        "no.crt: No such file or directory; give a PEM file",
    )


def test_version_prints_the_release_and_commit_of_tailor_and_the_package_of_triton(tailor: Tailor) -> None:
    ended = tailor("--version")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == [
        f"tailor {TAILOR_VERSION} (commit {source_commit()})",
        "tritonserver of nvidia-pytriton 0.7.0",
    ]

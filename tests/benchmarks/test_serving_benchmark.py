"""benchmarks.serving: a short run on a small network; the form of the tables is checked, not the figures."""

from __future__ import annotations

import re
import socket
import threading
import time

import pytest

from benchmarks import serving
from benchmarks.serving_load import Load, LoadError, http_request, run
from tests.support.project import ROOT

pytestmark = pytest.mark.end_to_end
NUMBER, SPREAD = r"[\d,.]+", r"[\d.]+ to [\d.]+"


def test_the_limit_is_measured_against_the_served_models_and_results_are_stored(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(ROOT)
    output = tmp_path / "table.md"
    arguments = ["--only", "limit-resnet20", "peer-litserve-resnet20", "--seconds", "0.2", "--rounds", "1"]
    arguments += ["--work", str(tmp_path / "work"), "--output", str(output), "--others", "1"]
    assert serving.main(arguments) == 0
    report = output.read_text()
    figures = rf"{NUMBER} \| {NUMBER} \| {NUMBER} \| {NUMBER} \| {NUMBER} \| {SPREAD} \|  \| {NUMBER}% \| {NUMBER}%"
    row = rf"^\| ResNet-20 \| (.+?) \| {figures} \|$"
    assert re.findall(row, report, re.MULTILINE) == [
        "`student`, HTTP, batch 1",
        "`student`, HTTP, batch 8",
        "`student`, gRPC, batch 1",
        "`classifier`, HTTP, JPEG",
    ]
    assert "ResNet-20, raw: best at " in report and "measured before each of the 6 turns" in report
    assert "LitServe | not installed: python3 -m venv build/peers" in report
    assert "`python -m benchmarks.serving --device gpu" in report
    assert "round 1 of 1: gRPC, batch 1" in capfd.readouterr().err

    assert serving.main(arguments) == 0
    assert output.read_text() == report
    assert "round" not in capfd.readouterr().err


def test_an_error_response_ends_the_turn_with_the_reason_of_the_server():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            with listener.accept()[0] as connection:
                connection.recv(65536)
                connection.sendall(b'HTTP/1.1 500 Internal Server Error\r\nContent-Length: 23\r\n\r\n{"error":')
                time.sleep(0.05)
                connection.sendall(b'"not healthy"}')

        thread = threading.Thread(target=refuse)
        thread.start()
        with pytest.raises(
            LoadError, match=r'the server answered 500 Internal Server Error: \{"error":"not healthy"\}'
        ):
            run(Load(listener.getsockname()[1], [http_request("/", b"x", {})], users=1), 0.5)
        thread.join()


def test_an_unknown_section_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as ended:
        serving.main(["--only", "limit-resnet32", "peer-*-resnet51"])
    assert ended.value.code == 2
    assert "'peer-*-resnet51' matches no section; expected limit-resnet32" in capsys.readouterr().err

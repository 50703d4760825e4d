"""Control characters and formulas in class names, file names and server responses are neutralised in all output."""

from __future__ import annotations

import csv
import http.server
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from tritonclient.utils import serialize_byte_tensor

from serving.client.predictions import Prediction, as_rows
from serving.commands.predict import prediction_table
from serving.shared.errors import ServingError
from serving.shared.terminal import CONTROLS, Console, cell, counted, csv_cell, plain_cell, print, safe_text

HOSTILE = "\x1b]0;x\x07\x1b[31mred[/][bold]:cat:\u202e\x9b2J"
SHOWN = "\\u001b]0;x\\u0007\\u001b[31mred[/][bold]:cat:\\u202e\\u009b2J"


def assert_safe(text: str) -> None:
    assert not CONTROLS.search(text), ascii(text)


def test_safe_text_escapes_only_control_characters() -> None:
    assert safe_text(HOSTILE) == SHOWN
    assert safe_text("café ☃ مرحبا 👩‍🔬\ttab\nline") == "café ☃ مرحبا 👩‍🔬\ttab\nline"
    assert safe_text("cr\rdel\x7fsurrogate\udce9") == "cr\\u000ddel\\u007fsurrogate\\udce9"


def test_counted_uses_the_singular_for_1() -> None:
    assert [counted(number, "image") for number in (0, 1, 2, 1200)] == [
        "0 images",
        "1 image",
        "2 images",
        "1,200 images",
    ]
    plurals = {"test class": "test classes", "box": "boxes", "batch": "batches", "epoch": "epochs", "share": "shares"}
    for noun, plural in plurals.items():
        assert [counted(number, noun) for number in (1, 3)] == [f"1 {noun}", f"3 {plural}"]
    verbs = ("are", "were", "have", "lie")
    assert [counted(1, "box", verb) for verb in verbs] == ["1 box is", "1 box was", "1 box has", "1 box lies"]
    assert [counted(2, "box", verb) for verb in verbs] == [f"2 boxes {verb}" for verb in verbs]


def test_printed_json_keeps_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    print(json.dumps({"class": HOSTILE}, ensure_ascii=False, indent=2))
    printed = capsys.readouterr().out
    assert_safe(printed)
    assert json.loads(printed) == {"class": HOSTILE}


def test_a_table_prints_a_hostile_name_as_text_on_one_line() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, color_system="truecolor", width=200)
    console.print(prediction_table([(Path(HOSTILE), Prediction((HOSTILE,), (0,), (1.0,), 1))], None, HOSTILE))
    lines = stream.getvalue()
    assert lines.count(SHOWN) == 3
    assert "\x1b]" not in lines and "\x07" not in lines and "\u202e" not in lines and "\x1b[31m" not in lines
    assert cell("a\nb[red]") == "a\\nb\\[red]"


@pytest.mark.parametrize("text", ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "＝1", "-cat", "+"])
def test_csv_cell_adds_an_apostrophe_to_a_formula_and_plain_cell_removes_it(text: str) -> None:
    assert csv_cell(text) == safe_text(f"'{text}")
    assert plain_cell(f"'{text}") == text


@pytest.mark.parametrize("value", [-1.5, 3, None, "-1.5", "+2", "-1e-7", "cat", "'tis", "a=b", ""])
def test_csv_cell_does_not_change_numbers_and_other_text(value: object) -> None:
    assert csv_cell(value) == value
    assert not isinstance(value, str) or plain_cell(value) == value


def test_csv_rows_are_safe_for_classes_files_and_errors() -> None:
    rows = as_rows(Path("=cmd.png"), Prediction(("@x", HOSTILE), (0, 1), (0.5, 0.25), 1), None)
    assert rows == [["'=cmd.png", 1, 1, "'@x", 0, 0.5, ""], ["'=cmd.png", 1, 2, SHOWN, 1, 0.25, ""]]
    assert as_rows(Path("a.png"), ServingError("=x\x1b"), None) == [["a.png", "", "", "", "", "", "'=x\\u001b"]]


class HostileServer(http.server.BaseHTTPRequestHandler):
    """HTTP handler with Triton's responses and hostile names."""

    def do_GET(self) -> None:
        content = {"name": HOSTILE, "version": HOSTILE, "max_batch_size": 8, "versions": ["1"], "platform": HOSTILE,
                   "inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1, 1]},
                              {"name": "strength", "datatype": "FP32", "shape": [-1, 1]}]}  # fmt: skip
        self._send(200, content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if b"refuse" in body:
            self._send(400, {"error": HOSTILE})
            return
        names = serialize_byte_tensor(np.array([[HOSTILE.encode(), b"=SUM(A1)"]], dtype=np.object_)).item()
        data = names, np.array([[1, 0]], np.int32).tobytes(), np.array([[0.75, 0.25]], np.float32).tobytes()
        kinds = ("class", "BYTES"), ("index", "INT32"), ("probability", "FP32")
        outputs = [
            {"name": name, "datatype": kind, "shape": [1, 2], "parameters": {"binary_data_size": len(part)}}
            for (name, kind), part in zip(kinds, data, strict=True)
        ]
        head = json.dumps({"model_name": "classifier", "model_version": "1", "outputs": outputs}).encode()
        self._send(200, head + b"".join(data), **{"Inference-Header-Content-Length": len(head)})

    def _send(self, status: int, content: object, **headers: object) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def hostile_url() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), HostileServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("form", [(), ("--json",), ("--csv",)])
def test_predict_prints_the_response_of_a_hostile_server_safely(tailor, tmp_path, hostile_url, form) -> None:
    image = tmp_path / f"=1{HOSTILE.replace('/', '')}.png"
    image.write_bytes(picture(3))
    ended = tailor("predict", image.name, "--url", hostile_url, "--prior", "balanced", *form)
    assert ended.returncode == 0, ended.stderr
    assert_safe(ended.stdout + ended.stderr)
    if form == ("--json",):
        assert json.loads(ended.stdout)[0]["predictions"][0]["class"] == HOSTILE
    elif form == ("--csv",):
        rows = list(csv.DictReader(io.StringIO(ended.stdout)))
        assert [row["class"] for row in rows] == [SHOWN, "'=SUM(A1)"] and rows[0]["image"].startswith("'=1")
        assert rows[0]["probability"] == "0.75"
    else:
        assert "\\u001b[31mred" in ended.stdout and "[bold]" in ended.stdout


@pytest.mark.slow
def test_errors_and_status_of_a_hostile_server_are_printed_safely(tailor, tmp_path, hostile_url) -> None:
    (tmp_path / "refused.png").write_bytes(picture(3) + b"refuse")
    for command in (["predict", "refused.png"], ["status"], ["predict", f"none{HOSTILE.replace('/', '')}.png"]):
        ended = tailor(*command, "--url", hostile_url)
        assert_safe(ended.stdout + ended.stderr)
    assert SHOWN.replace("[/]", "[]") in ended.stderr and ended.stderr.count("\n") == 1

"""The local server's compiled backend for `student`: its answers, what it refuses, and servers that do without it."""

from __future__ import annotations

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, FEATURE_DIM, MAX_BATCH_SIZE, SIZE, Release, write_export
from container import backends, metrics_text
from test_supervisor import Watched

from serving.compiled_backend import NotCompiled, compiled_backend
from serving.errors import ServingError
from serving.failures import Refused
from serving.manifest import sha256_of
from serving.model_control import ModelControl
from serving.promotion import promote
from serving.server import TritonServer
from serving.transport import Transport

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing"),
    pytest.mark.skipif(backends() is not None, reason="a container runs Triton's own backend"),
]
OUTPUTS = {"logits": 0, "feature": 0}


@pytest.fixture(scope="module")
def session(release: Release) -> object:
    """ONNX Runtime in Python on the same graph, with as many threads as the backend has."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    path = str(release.export_dir / "student.onnx")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@pytest.fixture(params=["http", "grpc"])
def transport(server: TritonServer, request: pytest.FixtureRequest) -> Transport:
    assert server.stub_models == ("classifier",) and server.not_compiled == ""
    opened = Transport(server.http_url if request.param == "http" else server.grpc_url, timeout=30)
    yield opened
    opened.close()


def counts_of(server: TritonServer, version: str = "1") -> dict[str, int]:
    """Triton's counters of `student`."""
    labels = f'{{model="student",version="{version}"}}'
    lines = re.findall(
        rf"^(nv_inference_\w+){re.escape(labels)} (\d+)$", metrics_text(server.metrics_url), re.MULTILINE
    )
    return {name: int(value) for name, value in lines}


def inputs_of(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    strengths = random.normal(size=(rows, 1)).astype(np.float32)
    return {"image": random.integers(0, 256, (rows, 3, SIZE, SIZE), dtype=np.uint8), "strength": strengths}


@pytest.mark.parametrize("rows", [1, 3, MAX_BATCH_SIZE])
def test_answers_are_bit_identical_to_onnx_runtime_in_python(transport: Transport, session: object, rows: int) -> None:
    inputs = inputs_of(rows)
    expected = dict(zip(OUTPUTS, session.run(list(OUTPUTS), inputs), strict=True))
    answered, version = transport.infer("student", inputs, OUTPUTS)
    assert version == 1
    assert {name: array.shape for name, array in answered.items()} == {
        "logits": (rows, len(CLASSES)),
        "feature": (rows, FEATURE_DIM),
    }
    for name in OUTPUTS:
        assert answered[name].tobytes() == expected[name].tobytes()
        alone, _ = transport.infer("student", inputs, {name: 0})
        assert list(alone) == [name]
        assert alone[name].tobytes() == expected[name].tobytes()


def test_requests_of_one_batch_get_their_own_rows_and_a_bad_one_fails_alone(
    server: TritonServer, session: object
) -> None:
    bad = {5: np.nan, 11: np.inf, 17: 3e38}  # the last is finite, its logits are not

    def infer(number: int) -> tuple[int, dict[str, np.ndarray] | str]:
        inputs = inputs_of(1 + number % 3, seed=number % 48)
        if number % 24 in bad:
            inputs["strength"][:] = bad[number % 24]
        outputs = OUTPUTS if number % 2 else {"logits": 0}
        try:
            return number, shared.infer("student", inputs, outputs)[0]
        except Refused as refused:
            return number, str(refused)

    shared = Transport(server.grpc_url, timeout=30)
    before = counts_of(server)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(infer, range(480)))
    after = counts_of(server)
    shared.close()
    for number, answer in answers:
        if number % 24 in bad:
            expected = "the answer holds a number" if number % 24 == 17 else "strength holds a number"
            assert isinstance(answer, str) and f"{expected} that is not finite; expected" in answer
            continue
        inputs = inputs_of(1 + number % 3, seed=number % 48)
        assert sorted(answer) == (["feature", "logits"] if number % 2 else ["logits"])
        np.testing.assert_allclose(answer["logits"], session.run(["logits"], inputs)[0], rtol=1e-5, atol=1e-5)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["nv_inference_request_success"] == 420
    assert grown["nv_inference_exec_count"] < 480  # batches were formed


def test_changed_graph_is_not_loaded_and_the_loaded_one_answers(
    serving: TritonServer, root: Path, session: object
) -> None:
    path = root / "student" / "1" / "model.onnx"
    expected = sha256_of(path)
    path.write_bytes(path.read_bytes() + b"\0")
    refused = re.escape(
        f"student/1/model.onnx: sha256 is {sha256_of(path)[:12]}..., manifest.json says {expected[:12]}...; "
        "write the version again"
    )
    with ModelControl(serving.running, timeout=30) as control:
        with pytest.raises(ServingError, match=refused):
            control.load("student")
        path.unlink()
        with pytest.raises(ServingError, match=r"student/1/model\.onnx: No such file or directory; write the version"):
            control.load("student")
    transport, inputs = Transport(serving.http_url, timeout=30), inputs_of(2)
    answered, _ = transport.infer("student", inputs, {"logits": 0})
    transport.close()
    assert answered["logits"].tobytes() == session.run(["logits"], inputs)[0].tobytes()


@pytest.mark.end_to_end
def test_swap_loads_the_new_version_alone(root: Path, tmp_path: Path) -> None:
    write_export(tmp_path / "second", version=2)
    log = tmp_path / "triton.log"
    with TritonServer(root, http_port=0, grpc_port=0, metrics_port=0, log=log) as server:
        assert promote(root, tmp_path / "second").version == 2
        with ModelControl(server.running, timeout=30) as control:
            assert control.ready_versions("student") == [1, 2]
        # Triton prints this of a version that it has loaded a second time.
        assert "successfully unloaded 'student' version 1" not in log.read_text()


@pytest.mark.end_to_end
def test_supervisor_expects_no_inference_process_of_student(root: Path) -> None:
    watched = Watched(root)
    try:
        watched.kill_stub("classifier")
        watched.await_report("classifier answers again")
        assert watched.answers() == 8
        assert not any("student" in line for line in watched.reports)
    finally:
        watched.stop()


def compiler(folder: Path, body: str) -> Path:
    """A program in the place of g++."""
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o700)
    return path


@pytest.mark.end_to_end
def test_library_that_expects_another_onnxruntime_fails_the_start(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler(tmp_path, """exec g++ "$@" -UORT_VERSION '-DORT_VERSION="0.1"'""")))
    log = tmp_path / "triton.log"
    with pytest.raises(ServingError, match="the Triton server ended"):
        TritonServer(root, http_port=0, grpc_port=0, metrics_port=0, log=log).start()
    assert re.search(r"libonnxruntime\.so\.\S+: version is [0-9.]+; expected 0\.1", log.read_text())


@pytest.mark.end_to_end
def test_server_without_a_compiler_runs_student_in_pythons_backend(
    root: Path, session: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "")
    with TritonServer(root, http_port=0, grpc_port=0, metrics_port=0) as server:
        assert server.not_compiled == "there is no compiler '' on PATH; install g++"
        assert server.stub_models == ("student", "classifier")
        assert set(server.stubs()) == {("student", 1), ("classifier", 1)}
        transport, inputs = Transport(server.http_url, timeout=30), inputs_of(3)
        answered, _ = transport.infer("student", inputs, OUTPUTS)
        transport.close()
        np.testing.assert_array_equal(answered["logits"], session.run(["logits"], inputs)[0])


def test_library_is_compiled_once_for_each_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    counting = f'''[ "$1" = --version ] && echo 1 && exit
echo run >> {tmp_path}/runs
for last; do :; done
echo a library > "$last" && chmod 700 "$last"'''
    monkeypatch.setenv("CXX", str(compiler(tmp_path, counting)))
    first = compiled_backend()
    assert compiled_backend() == first and first.is_relative_to(tmp_path / "cache" / "tailor")
    assert [path.name for path in first.parent.iterdir()] == ["libtriton_student.so"]
    assert (tmp_path / "runs").read_text() == "run\n"
    compiler(tmp_path, counting.replace("echo 1", "echo 2"))
    assert compiled_backend() != first


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            '[ "$1" = --version ] && exit; echo "a.cpp: note" >&2; echo "a.cpp: error: no\nway" >&2; exit 1',
            "a.cpp: error: no",
        ),
        ("exit 3", "compiler: "),
    ],
)
def test_failing_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler(tmp_path, body)))
    with pytest.raises(NotCompiled, match=message) as caught:
        compiled_backend()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.so"))


def test_cache_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(NotCompiled, match=r"file/tailor.*: Not a directory; set XDG_CACHE_HOME to a writable folder"):
        compiled_backend()


def test_source_compiles_without_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(compiler(tmp_path, 'exec g++ -Werror "$@"')))
    assert compiled_backend().is_file()

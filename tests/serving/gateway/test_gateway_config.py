"""The gateway's configuration: valid and invalid options, and the files that it writes for nginx."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from ipaddress import IPv4Network
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

from serving.gateway import nginx_process as gateway_process
from serving.gateway.config import Gateway, read_gateway
from serving.gateway.nginx_process import check_config, find_nginx, write_config
from serving.repository.manifest import Explain, SegmentationFormat, read_manifest
from serving.repository.model_config import Placement, classifier_config, student_config
from serving.shared.errors import InputError, ServingError
from tests.support.running_gateway import make_certificate, require_nginx


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"http_port": 0}, "http_port is 0"),
        ({"http_port": 8081}, "http_port and grpc_port are both 8081"),
        ({"host": "nowhere"}, "host is nowhere"),
        ({"host": "0.0.0.0"}, "host is 0.0.0.0 without TLS; give certificate and key"),
        ({"certificate": "/a.crt"}, "certificate and key belong together"),
        ({"certificate": "/a.crt;}", "key": "/a.key"}, "has a character that nginx would interpret"),
        ({"access_log": '/tmp/"log'}, "has a character that nginx would interpret"),
        ({"access_log": "/tmp/$host"}, "has a character that nginx would interpret"),
        ({"upstream_http": "127.0.0.1:8000; include /etc/passwd"}, "upstream_http is 127.0.0.1:8000; include"),
        ({"upstream_grpc": "127.0.0.1"}, "upstream_grpc is 127.0.0.1"),
        ({"body_bytes": "many"}, "body_bytes is many"),
        ({"connections": 0}, "connections is 0"),
        ({"trusted_proxies": ["10.0.0.1/8"]}, "trusted_proxies.0 is 10.0.0.1/8"),
        ({"body_size": 1}, "body_size is 1: Extra inputs are not permitted"),
    ],
)
def test_the_error_of_an_invalid_option_is_one_line_with_its_name(values: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        read_gateway(**values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("folder", ["/tmp/folder;", "/tmp/$host", '/tmp/a"b', "/tmp/a\nb", "/tmp/a\\", "relative"])
def test_a_folder_with_characters_that_nginx_interprets_is_rejected(folder: str) -> None:
    with pytest.raises(InputError, match="has a character that nginx would interpret"):
        Gateway().render(Path(folder))


@pytest.mark.parametrize("name", ["plain", "ü – 図 b", "nfd-u\u0308"], ids=["plain", "not ASCII, blanks", "NFD"])
@pytest.mark.parametrize("full", [False, True], ids=["defaults", "everything"])
def test_nginx_accepts_the_written_configuration(tmp_path: Path, full: bool, name: str) -> None:
    require_nginx()
    tmp_path = tmp_path / name
    tmp_path.mkdir()
    values: dict[str, object] = {"http_port": 28080, "grpc_port": 28081}
    if full:
        certificate, key = make_certificate(tmp_path)
        values |= {"certificate": certificate, "key": key, "access_log": tmp_path / "access.jsonl"}
        values |= {"host": "127.0.0.2", "requests_per_second": 50, "trusted_proxies": [IPv4Network("10.0.0.0/8")]}
        values |= {"upstream_http": "localhost:8000", "upstream_grpc": "127.0.0.1:8001", "workers": 3}
    gateway = read_gateway(**values)
    config = write_config(gateway, tmp_path)
    check_config(find_nginx(gateway), config)
    assert {path.name for path in tmp_path.glob("*.lua")} == {
        path.name for path in Path(gateway_process.__file__).with_name("lua").glob("*.lua")
    }


def test_the_accepted_tensors_are_those_of_the_model_configs(repository: Path) -> None:
    source = (Path(gateway_process.__file__).with_name("lua") / "tensors.lua").read_text()
    table = source.partition("tensors.MODELS = {")[2].partition("\n}\n")[0]
    manifest = read_manifest(repository / "classifier/1")
    maps = manifest.model_copy(
        update={"segmentation": SegmentationFormat(height=8, width=8, fill=(0, 0, 0), cells=(2, 2))}
    )
    explained = manifest.model_copy(update={"explain": Explain(images=0, bytes=1, map=(2, 2))})
    kinds = {kind: name.removeprefix("TYPE_").replace("STRING", "BYTES") for name, kind in DataType.items()}
    written = [repository / model / "config.pbtxt" for model in ("student", "classifier")]
    student, classifier = (text_format.Parse(path.read_text(), ModelConfig()) for path in written)
    students = [student, *(student_config(each, Placement()) for each in (maps, explained))]
    classifiers, segmenter = [classifier, classifier_config(explained)], classifier_config(maps)
    assert [config.name for config in (*classifiers, segmenter)] == ["classifier", "classifier", "segmenter"]
    for model, configs in (("student", students), ("classifier", classifiers), ("segmenter", [segmenter])):
        entry = re.search(rf"{model} = {{\s*inputs = {{(.*?)}},\s*outputs = {{(.*?)}},\s*}},\n", table, re.DOTALL)
        inputs = dict(re.findall(r'(\w+) = "(\w+)"', entry[1]))
        assert inputs == {tensor.name: kinds[tensor.data_type] for config in configs for tensor in config.input}
        outputs = {tensor.name for config in configs for tensor in config.output}
        assert set(re.findall(r"(\w+) = {", entry[2])) == outputs


def test_the_error_of_a_missing_nginx_names_the_packages_to_install() -> None:
    with pytest.raises(ServingError, match=r"nginx is missing; install it \(Debian: apt install nginx-light"):
        find_nginx(Gateway(), search_path="/nowhere")
    require_nginx()
    with pytest.raises(ServingError, match=r"ngx_http_lua_module\.so is missing"):
        find_nginx(Gateway(modules=Path("/nowhere")))


@pytest.mark.slow
def test_the_command_writes_the_configuration_for_another_nginx(
    tailor: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    ended = tailor("gateway", "--write", "gateway", "--runtime-folder", "/tmp", "--upstream-http", "server:8000")
    assert (ended.returncode, ended.stderr) == (0, "")
    written = Path(ended.stdout.strip())
    assert written == tmp_path / "gateway" / "nginx.conf"
    source = Path(gateway_process.__file__).with_name("lua") / "http.lua"
    assert (written.parent / "http.lua").read_text() == source.read_text()
    assert "server server:8000 " in written.read_text()
    assert 'pid "/tmp/nginx.pid";' in written.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "host is 0.0.0.0 without TLS; give certificate and key"),
        (["--http-port", "0"], "http_port is 0"),
        (["--trusted-proxy", "everyone"], "trusted_proxies.0 is everyone"),
        (["--body-mib", "0"], "body_bytes is 0"),
    ],
)
def test_the_command_rejects_invalid_options_in_one_line(
    tailor: Callable[..., subprocess.CompletedProcess[str]], arguments: list[str], message: str
) -> None:
    ended = tailor("gateway", *arguments)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert message in ended.stderr

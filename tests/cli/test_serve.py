"""The command ``ggml-cffi serve``: names of models, warnings, wrong arguments."""

import resource
import socket
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest

pytest.importorskip("fastapi", reason="needs pip install '.[serve]'")

from ggml_cffi.cli import make_parser, serve
from tests.support.byte_level_model import byte_level_model
from tests.support.command import run
from tests.support.http_server import served


def specs(*words):
    return serve.model_specs(make_parser().parse_args(["serve", *map(str, words)]))


def test_models_have_names_and_the_options_of_the_command_line(tmp_path):
    a, b = (byte_level_model(tmp_path / name) for name in ("a.gguf", "b=c.gguf"))
    found = specs(a, f"x={a}", b, "hf://org/repo:Q4_K_M", "--ctx", "64", "--kv-slots", "256", "--split", "data")
    assert list(found) == ["a", "x", "b=c", "repo:Q4_K_M"]
    assert found["x"].path == str(a)
    assert found["b=c"].path == str(b)
    options = found["a"].options
    assert (options["n_ctx"], options["kv_slots"], options["split"]) == (64, 256, "data")
    with pytest.raises(ValueError, match="two models have the name 'a'"):
        specs(a, a)
    with pytest.raises(ValueError, match="has no name: write NAME=FILE"):
        specs(f"={a}")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        specs(tmp_path / "missing.gguf")


def test_another_address_than_loopback_is_a_loud_warning(tmp_path):
    model = byte_level_model(tmp_path / "a.gguf")
    with served(model, "--devices", "CPU", "--host", "0.0.0.0") as server:
        assert "AND WITHOUT A KEY" in server.lines[0]
    with served(model, "--devices", "CPU", "--host", "0.0.0.0", GGML_CFFI_API_KEY="k") as server:
        assert "Requests need a key" in server.lines[0]
        assert server.get("/v1/models").status_code == 401
    with served(model, "--devices", "CPU") as server:
        assert "WARNING" not in server.lines[0]


def test_wrong_arguments_are_one_line(tmp_path):
    assert "there is no file" in run("serve", tmp_path / "missing.gguf", code=2).stderr
    model = byte_level_model(tmp_path / "a.gguf")
    assert "parallel must be at least 1" in run("serve", model, "--parallel", "0", code=2).stderr
    assert "--port must be 0 to 65535" in run("serve", model, "--port", "65536", code=2).stderr
    assert "an API key is empty" in run("serve", model, "--api-key", "", code=2).stderr
    model.write_bytes(model.read_bytes()[:3000])
    assert "cut short" in run("serve", model, "--preload", "--port", "0", code=2).stderr


def test_connections_are_not_limited_by_the_usual_number_of_open_files(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        with served(byte_level_model(tmp_path / "a.gguf"), "--devices", "CPU") as server, ExitStack() as stack:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            place = urlsplit(server.url)
            for _ in range(100):
                stack.enter_context(socket.create_connection((place.hostname, place.port)))
            assert server.get("/health").status_code == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

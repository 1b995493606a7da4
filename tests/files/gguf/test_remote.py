"""Headers of GGUF files on web servers."""

import re
import socket
import struct
import threading
from contextlib import contextmanager

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import cli, models
from ggml_cffi.files.gguf import remote
from tests.support import gguf_writer, llama_float64
from tests.support.web_server import serve

DATA = 24 << 20  # bytes of the tensors' data


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """Ask the servers themselves, no proxy."""
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def folder(tmp_path):
    """Return a folder with a model whose header is larger than one request, and whose data are larger still."""
    words = [f"word {i}" * 4 for i in range(60_000)]
    tensors = {name: (ggml.F32, np.zeros((1024, DATA // 8192), np.float32)) for name in ("a", "b")}
    gguf_writer.write(tmp_path / "m.gguf", {"general.architecture": "llama", "words": words}, tensors)
    return tmp_path


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
@pytest.mark.parametrize("name", ["m.gguf", "moved.gguf", "m.gguf?download=true"])
def test_only_the_header_of_a_url_is_read(folder, name, ranges):
    with (
        serve(folder, ranges=ranges) as web,
        ggml.GGUFFile(f"{web.url}/{name}", header_only=True) as file,
        ggml.GGUFFile(folder / "m.gguf") as local,
    ):
        assert file.tensors == local.tensors
        assert file.metadata == local.metadata
        assert file.file_bytes == local.file_bytes
        assert file.missing_bytes == 0
        with pytest.raises(ggml.FormatError, match="the data of tensor 'a' is missing"):
            file.raw("a")
    header_bytes = local.tensors["a"].offset
    assert remote.FIRST_REQUEST < header_bytes < DATA / 4
    if ranges:
        assert header_bytes <= web.sent <= 4 * header_bytes
    else:
        assert web.sent < DATA  # the rest was not taken; sockets hold a few MiB


def test_each_request_asks_for_the_bytes_that_follow(folder):
    with serve(folder) as web:
        ggml.GGUFFile(f"{web.url}/m.gguf", header_only=True).close()
    assert [header for _, header in web.requests] == [
        "bytes=0-1048575",
        "bytes=1048576-2097151",
        "bytes=2097152-4194303",
    ]


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_server_may_hide_the_size(folder, ranges):
    with serve(folder, ranges=ranges) as web, ggml.GGUFFile(folder / "m.gguf") as local:
        web.hides_size = True
        with ggml.GGUFFile(f"{web.url}/m.gguf", header_only=True) as file:
            assert file.tensors == local.tensors
            assert file.file_bytes == local.file_bytes


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_split_model_is_read_from_its_urls(tmp_path, ranges):
    for i, name in enumerate("ab"):
        values = {"split.no": i, "split.count": 2, "split.tensors.count": 2}
        path = tmp_path / f"m-{i + 1:05d}-of-00002.gguf"
        gguf_writer.write(path, values, {name: (ggml.F32, np.zeros(4, np.float32))})
    with serve(tmp_path, ranges=ranges) as web:
        first = f"{web.url}/m-00001-of-00002.gguf?download=true"
        with ggml.GGUFFile(first, header_only=True) as file:
            assert file.paths == (first, first.replace("m-00001", "m-00002"))
            assert [(t.name, t.part) for t in file.tensors.values()] == [("a", 0), ("b", 1)]
        (tmp_path / "m-00002-of-00002.gguf").unlink()
        with pytest.raises(ggml.FormatError, match=r"m-00002-of-00002.gguf\?download=true is missing"):
            ggml.GGUFFile(first, header_only=True)


def test_wrong_answers_are_refused(folder, monkeypatch):
    (folder / "page.html").write_text("<html>" * 99)
    (folder / "cut.gguf").write_bytes((folder / "m.gguf").read_bytes()[: 3 << 19])
    with serve(folder) as web:

        def refused(error, message, name="m.gguf"):
            with pytest.raises(error, match=message):
                ggml.GGUFFile(f"{web.url}/{name}", header_only=True)

        refused(FileNotFoundError, r"none.gguf: the server has no such file \(HTTP 404\)", "none.gguf")
        refused(OSError, "secret: the server answered HTTP 403 Forbidden", "secret")
        refused(ggml.FormatError, "page.html: not a GGUF file", "page.html")
        refused(ggml.FormatError, "cut.gguf: cut short", "cut.gguf")
        web.hides_size = True
        refused(ggml.FormatError, "cut.gguf: cut short: the server sent 1,572,864 bytes", "cut.gguf")
        web.hides_size = False
        web.shift = 1
        refused(OSError, "the server sent the range 'bytes 1-1048575/.*', not the one from byte 0")
        web.shift = 0
        monkeypatch.setattr(remote, "LARGEST_HEADER", remote.FIRST_REQUEST)
        refused(ggml.FormatError, "the header is larger than 1,048,576 bytes")
        address = web.url
    with pytest.raises(OSError, match="cannot be read: URL can't contain control characters"):
        ggml.GGUFFile(f"{address}/a model.gguf", header_only=True)
    with pytest.raises(OSError, match="cannot be reached: "):
        ggml.GGUFFile(f"{address}/m.gguf", header_only=True)


@contextmanager
def broken_server(sent):
    """Return the URL of a server that answers with the bytes ``sent``, and resets the connection; None for silence."""

    def answer():
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(sent)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer)
        if sent is not None:
            thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/m.gguf"
        if sent is not None:
            thread.join()


@pytest.mark.parametrize("sent", [None, b"", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nGGUF"], ids=str)
def test_a_connection_that_breaks_is_an_error_with_the_url_and_advice(monkeypatch, sent):
    monkeypatch.setattr(remote, "TIMEOUT", 0.2 if sent is None else 60.0)
    with (
        broken_server(sent) as url,
        pytest.raises(OSError, match=f"{url} cannot be read: .*; check the address and the connection, or download"),
    ):
        ggml.GGUFFile(url, header_only=True)


@pytest.mark.parametrize("url", ["http://[::1", "http://a..b/x", "http://127.0.0.1:port/m.gguf", "http:///m.gguf"])
def test_a_malformed_address_is_an_error_with_the_url_and_advice(url):
    with pytest.raises(OSError, match=f"^{re.escape(url)} cannot be (read|reached): .*; check the address"):
        ggml.GGUFFile(url, header_only=True)


def test_a_whole_file_is_not_taken_for_a_later_range(folder):
    with serve(folder) as web:
        web.forgets_ranges = True
        with pytest.raises(OSError, match=r"m.gguf: the server ignores ranges after the first request: download"):
            ggml.GGUFFile(f"{web.url}/m.gguf", header_only=True)


def test_models_are_planned_from_their_urls(tmp_path, rng, capsys):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    with serve(tmp_path) as web:
        url = f"{web.url}/m.gguf"
        plan = models.plan(url, ["1G", "CPU:1G"])
        assert plan.path == url
        assert plan.devices == models.plan(path, ["1G", "CPU:1G"]).devices
        assert cli.main(["plan", url, "--devices", "1G"]) == 0
        assert capsys.readouterr().out.startswith("m.gguf: context 512")
        assert cli.main(["gguf", "show", url]) == 0
        assert "blk.0.attn_q.weight" in capsys.readouterr().out
        with pytest.raises(ValueError, match=r"m.gguf is a URL, of which only the header can be read: download"):
            models.load(url)

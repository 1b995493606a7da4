"""Several models: aliases, loading on demand, unloading for memory, embeddings and chats side by side."""

import asyncio
import base64
import threading

import numpy as np
import pytest
from fastapi.testclient import TestClient

from ggml_cffi import models
from ggml_cffi.errors import ClosedError
from ggml_cffi.server import Catalog, ModelSpec, create_app
from ggml_cffi.server.catalog import open_engine, planned_bytes
from ggml_cffi.server.engine import EmbedJob
from ggml_cffi.server.errors import ApiError, StoppingError
from tests.support.http_server import served

OPTIONS = {"devices": ["CPU"], "n_ctx": 512, "n_threads": 1}


@pytest.fixture
def specs(tiny):
    return {name: ModelSpec(tiny, OPTIONS) for name in "abc"}


async def use(catalog, name):
    """Use a model for a moment, and return the names of those that are loaded."""
    async with catalog.use(name) as loaded:
        assert loaded.name == name
        return sorted(model.name for model in catalog.loaded)


def test_a_model_is_loaded_when_it_is_asked_for_and_stays(specs):
    async def main():
        assert catalog.names == ["a", "b", "c"]
        assert not catalog.loaded
        assert await use(catalog, "b") == ["b"]
        first = catalog.loaded[0]
        assert await use(catalog, "b") == ["b"]
        assert catalog.loaded[0] is first

    with Catalog(specs) as catalog:
        asyncio.run(main())


def test_the_model_that_was_used_least_recently_is_unloaded_for_another(specs):
    async def main():
        await use(catalog, "a")
        await use(catalog, "b")
        await use(catalog, "a")
        return await use(catalog, "c")

    size = planned_bytes(specs["a"])
    with Catalog(specs, memory=int(size * 2.5)) as catalog:
        assert asyncio.run(main()) == ["a", "c"]


def test_a_busy_model_is_not_unloaded_and_later_requests_do_not_starve_another(specs):
    async def main():
        order = []

        async def note(name):
            await use(catalog, name)
            order.append(name)

        async with catalog.use("a"):
            other = asyncio.create_task(note("b"))
            while catalog.is_open:
                await asyncio.sleep(0.001)
            late = asyncio.create_task(note("a"))
            await asyncio.sleep(0.01)
            assert [loaded.name for loaded in catalog.loaded] == ["a"]
            assert not order
        await asyncio.gather(other, late)
        return order

    with Catalog(specs, memory=int(planned_bytes(specs["a"]) * 1.5)) as catalog:
        assert asyncio.run(main()) == ["b", "a"]


def test_a_model_that_never_fits_and_a_wrong_file_are_errors_of_their_own(specs, tmp_path):
    async def main():
        with pytest.raises(MemoryError, match="the model needs"):
            await use(catalog, "a")

    with Catalog(specs, memory="1K") as catalog:
        asyncio.run(main())

    async def broken():
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                await use(catalog, "x")
        assert await use(catalog, "a") == ["a"]

    with Catalog({"x": tmp_path / "missing.gguf", **specs}) as catalog:
        asyncio.run(broken())


@pytest.mark.parametrize("isolate", [False, True])
def test_a_model_that_cannot_be_loaded_is_not_the_client_s_error(tiny, tmp_path, caplog, isolate):
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny.read_bytes()[:3000])
    catalog = {"damaged": damaged, "option": ModelSpec(tiny, {**OPTIONS, "split": "none such"})}
    with TestClient(create_app(catalog, isolate=isolate), raise_server_exceptions=False) as client:
        for name, reason in (("damaged", "cut short"), ("option", "'none such'")):
            caplog.clear()
            response = client.post("/v1/completions", json={"model": name, "prompt": "a"})
            assert response.status_code == 500
            error = response.json()["error"]
            assert error["type"] == "server_error"
            assert error["message"] == f"the model {name!r} cannot be loaded: the log of the server has the reason"
            (record,) = caplog.records
            assert reason in str(record.exc_info[1].__cause__)


def test_requests_that_wait_for_a_load_share_it_and_may_leave(specs):
    async def main():
        tasks = [asyncio.create_task(use(catalog, "a")) for _ in range(5)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        assert found[1:] == [["a"]] * 4

    with Catalog(specs) as catalog:
        asyncio.run(main())


@pytest.mark.parametrize("stops", [False, True])
def test_a_load_that_the_end_of_the_server_interrupts_leaves_no_model_open(specs, monkeypatch, stops):
    began, goes_on, engines = threading.Event(), threading.Event(), []

    def slowly(path, **settings):
        began.set()
        assert goes_on.wait(60)
        engines.append(open_engine(path, **settings))
        return engines[-1]

    async def main():
        asking = asyncio.create_task(use(catalog, "a"))
        await asyncio.to_thread(began.wait, 60)
        asking.cancel()
        if stops:
            catalog.stop()
            with pytest.raises(StoppingError):
                await use(catalog, "b")
        asyncio.get_running_loop().call_soon(goes_on.set)

    monkeypatch.setattr("ggml_cffi.server.catalog.open_engine", slowly)
    with Catalog(specs) as catalog:
        asyncio.run(main())
    (engine,) = engines
    with pytest.raises(StoppingError):
        engine.submit(EmbedJob([[1]]), print)
    with pytest.raises(ClosedError):
        engine.model.embed([[1]])


def test_names(specs):
    async def main():
        with pytest.raises(ApiError, match="'model' is missing: give one of a, b, c"):
            await use(catalog, None)
        with pytest.raises(ApiError, match="the model 'd' does not exist: there are a, b, c"):
            await use(catalog, "d")

    with Catalog(specs) as catalog:
        asyncio.run(main())
    with pytest.raises(ValueError, match="there are no models"):
        Catalog({})
    with pytest.raises(ValueError, match="parallel must be at least 1"):
        Catalog(specs, parallel=0)


@pytest.fixture(scope="module")
def both(tiny, encoder):
    """A server of a model that generates text and of one that embeds."""
    options = ["--devices", "CPU", "--threads", "1", "--ctx", "512"]
    with served(f"chat={tiny}", f"embed={encoder}", *options) as found:
        yield found


def test_embeddings_and_chats_side_by_side(both, encoder):
    entries = both.get("/v1/models").json()["data"]
    assert [entry["id"] for entry in entries] == ["chat", "embed"]
    texts = [[1, 2, 3, 4], [5, 6], [7]]
    with models.load(encoder, ["CPU"]) as model:
        want = model.embed(texts)
    chat = {"model": "chat", "messages": [{"role": "user", "content": "a"}], "max_tokens": 200, "temperature": 0}
    status = []
    thread = threading.Thread(target=lambda: status.append(both.post("/v1/chat/completions", chat).status_code))
    thread.start()
    for encoding in ("float", "base64"):
        found = both.post("/v1/embeddings", {"model": "embed", "input": texts, "encoding_format": encoding}).json()
        assert found["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
        vectors = [item["embedding"] for item in found["data"]]
        if encoding == "base64":
            vectors = [np.frombuffer(base64.b64decode(vector), "<f4") for vector in vectors]
        assert np.abs(np.array(vectors) - want).max() < 1e-4
    thread.join()
    assert status == [200]


@pytest.mark.parametrize(
    ("path", "change", "message"),
    [
        ("/v1/embeddings", {"input": [[]]}, "text 0 has no tokens"),
        ("/v1/embeddings", {"input": []}, "a request has 1 to 2048 texts"),
        ("/v1/embeddings", {"input": [[1] * 41]}, "text 0 has 41 tokens, and the model embeds at most 40"),
        ("/v1/embeddings", {"input": [[99]]}, "token ids must be 0 to 49"),
        ("/v1/embeddings", {"input": [[1]], "dimensions": 8}, "have 64 dimensions"),
        ("/v1/completions", {"prompt": [1]}, "'embed' generates no text"),
    ],
)
def test_wrong_requests_for_embeddings(both, path, change, message):
    response = both.post(path, {"model": "embed", **change})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]


def test_reranking_needs_a_model_for_embeddings(both):
    body = {"query": "a", "documents": ["b"]}
    response = both.post("/v1/rerank", {"model": "chat", **body})
    assert response.status_code == 400
    assert "reranking needs a model for embeddings" in response.json()["error"]["message"]


def test_tokens_and_text(both):
    found = both.post("/tokenize", {"model": "chat", "prompt": "abc"}).json()
    assert found == {"tokens": [97, 98, 99], "count": 3, "max_model_len": 512}
    assert both.post("/detokenize", {"model": "chat", "tokens": found["tokens"]}).json() == {"prompt": "abc"}
    chat = both.post("/tokenize", {"model": "chat", "messages": [{"role": "user", "content": "a"}]}).json()
    assert chat["tokens"][0] == 258  # <|im_start|>
    assert both.post("/tokenize", {"model": "chat"}).status_code == 400
    assert both.post("/detokenize", {"model": "chat", "tokens": [-1]}).status_code == 400

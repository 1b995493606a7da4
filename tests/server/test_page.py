"""The page for chats, in a headless browser: an answer streams, is stopped, and shows its speed."""

import json

import pytest

from tests.server.conftest import CONTEXT, OPTIONS
from tests.support import ROOT
from tests.support.byte_level_model import byte_level_model
from tests.support.chromium import open_page
from tests.support.http_server import served, until

TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
END = ("tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of a model without end tokens: an answer lasts until it is stopped."""
    path = tmp_path_factory.mktemp("endless") / "tiny.gguf"
    byte_level_model(path, TEMPLATE, {"llama.context_length": CONTEXT}, specials=(), without=END)
    with served(f"tiny={path}", *OPTIONS) as found:
        yield found


def send(page, text):
    page.run(f"document.getElementById('prompt').value = {json.dumps(text)}")
    page.run("document.getElementById('form').requestSubmit()")


def texts(page, role):
    return page.run(f"[...document.querySelectorAll('.{role}')].map((element) => element.textContent)")


def test_the_page_streams_stops_and_shows_the_speed(server, tmp_path):
    with open_page(tmp_path) as page:
        page.open(server.url + "/")
        page.wait("document.getElementById('model').value === 'tiny'")
        send(page, "Hello")
        page.wait("/tokens\\/s/.test(document.getElementById('status').textContent)")
        assert not page.run("document.getElementById('stop').hidden")
        page.run("document.getElementById('stop').click()")
        page.wait("document.body.dataset.answers === '1'")
        until(server.is_idle)
        status = page.run("document.getElementById('status').textContent")
        assert status.endswith(", stopped")
        assert texts(page, "user") == ["Hello"]
        (answer,) = texts(page, "assistant")
        assert answer
        page.screenshot(ROOT / "build" / "artifacts" / "chat.png")
        assert not texts(page, "error")


def test_the_page_shows_an_error_of_the_server(server, tmp_path):
    with open_page(tmp_path) as page:
        page.open(server.url + "/")
        page.wait("document.getElementById('model').value === 'tiny'")
        send(page, "word " * 4000)
        page.wait("document.body.dataset.answers === '1'")
        (message,) = texts(page, "error")
        assert "this server takes at most 16384" in message

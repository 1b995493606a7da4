"""Products of a user's factory: entered, closed with their session, or used as they are."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import pytest

import ggml_cffi as ggml
from ggml_cffi.session import open_product


def test_a_context_manager_is_entered_and_left():
    events = []

    @contextmanager
    def product():
        events.append("entered")
        yield "value"
        events.append("left")

    with ExitStack() as stack:
        assert open_product(product(), stack) == "value"
        assert events == ["entered"]
    assert events == ["entered", "left"]


def test_a_compiled_function_closes_its_session():
    session = ggml.Session(["CPU"], n_threads=1)
    function = session.compile(lambda x: x)
    with ExitStack() as stack:
        assert open_product(function, stack) is function
    with pytest.raises(ggml.ClosedError):
        session.backends  # noqa: B018


def test_any_other_object_is_used_as_it_is():
    with ExitStack() as stack:
        assert open_product(len, stack) is len

"""Fixtures of the sessions' tests."""

import pytest

import ggml_cffi as ggml


@pytest.fixture
def session(devices):
    with ggml.Session(devices) as made:
        yield made

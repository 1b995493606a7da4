"""Worker processes that several tests use."""

import numpy as np
import pytest

from ggml_cffi.isolate import Worker
from tests.support import isolated


@pytest.fixture(scope="module")
def worker():
    with Worker(isolated.things) as worker:
        yield worker


@pytest.fixture
def crashing():
    with Worker(isolated.Crashes, np.arange(10_000)) as worker:
        yield worker

"""Exceptions and results of a worker process on their way to the parent."""

import threading

import pytest

import ggml_cffi as ggml
from ggml_cffi.isolate import Worker
from tests.support import isolated


def test_exceptions_keep_their_type(worker):
    with pytest.raises(isolated.LocalError, match="mine") as caught:
        worker.fail(isolated.LocalError, "mine")
    (note,) = caught.value.__notes__
    assert note.startswith(f"In the worker process {worker.pid}:\nTraceback")
    assert "isolated.py" in note
    assert "raise kind(*args)" in note
    assert "_worker_main" not in note
    for kind in (ggml.OutOfMemoryError, ggml.ClosedError, KeyError, KeyboardInterrupt, StopIteration):
        with pytest.raises(kind, match="text"):
            worker.fail(kind, "text")

    class HereError(Exception):
        pass

    with pytest.raises(HereError, match="local"):
        worker.fail(HereError, "local")


def test_an_exception_that_cannot_be_pickled_arrives_as_its_base(worker):
    with pytest.raises(ValueError, match="OddError") as caught:
        worker.fail(isolated.OddError, "one", "two")
    assert (type(caught.value), str(caught.value)) == (ValueError, "OddError: one and two")
    assert "isolated.OddError: one and two" in caught.value.__notes__[0]

    class HoldingError(Exception):
        def __init__(self):
            super().__init__("it")
            self.lock = threading.Lock()

    with pytest.raises(Exception, match=r"HoldingError: it") as caught:
        worker.fail(HoldingError)
    assert type(caught.value) is Exception


def test_values_that_cannot_be_sent_are_refused_with_a_reason(worker):
    with pytest.raises(TypeError, match="an argument of 'same' cannot be sent to another process: cannot pickle '_thr"):
        worker.same(threading.Lock())
    with ggml.Session(["CPU"]) as session, pytest.raises(TypeError, match="an argument of 'same' cannot be sent"):
        worker.same(lambda: session)
    with pytest.raises(TypeError, match=r"a lock cannot be sent to the parent process: cannot pickle '_thread\.lock'"):
        worker.lock()
    with pytest.raises(TypeError, match="make, or an argument of it, cannot be sent"):
        Worker(isolated.things, threading.Lock())
    assert worker.same(3) == 3

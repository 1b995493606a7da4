"""Functions and classes that the tests run in worker processes, in a module that imports no pytest."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import time
import warnings

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import c


class OddError(ValueError):
    """An exception that cannot be unpickled."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class LocalError(ggml.GgmlError):
    """An exception that can be pickled."""


class Things:
    """An object whose methods are called in a worker."""

    n = 7

    def __init__(self, weight=None):
        self.weight = weight
        self.kept = []
        self.closed_streams = 0

    def same(self, *values):
        return values[0] if len(values) == 1 else values

    def keep(self, array):
        self.kept.append(array)
        return len(self.kept)

    def kept_sums(self):
        return [float(a.sum()) for a in self.kept]

    def spoil(self, array):
        array[...] = -1
        return array

    def count(self, n, fail_at=None):
        try:
            for i in range(n):
                if i == fail_at:
                    raise ValueError("enough")
                yield np.full(20_000, i)
        finally:
            self.closed_streams += 1

    def n_closed(self):
        return self.closed_streams

    def fail(self, kind, *args):
        raise kind(*args)

    def lock(self):
        return threading.Lock()

    def log(self):
        logging.getLogger("isolated.deep").debug("details %d", 1)
        logging.getLogger("isolated").warning("a warning of %s", "mine", extra={"colour": "red"})
        warnings.warn("be warned", stacklevel=1)
        os.write(2, b"from C\nand more\rthan one line")

    def env(self, name):
        return os.environ.get(name)

    def sleep(self, seconds, flag=None):
        """Sleep, after making the file ``flag``."""
        if flag is not None:
            flag.touch()
        time.sleep(seconds)
        return seconds

    def pid(self):
        return os.getpid()


def things(*args):
    return Things(*args)


def raising(message):
    raise LocalError(message)


def dying():
    os.kill(os.getpid(), signal.SIGSEGV)


def scaled(weight):
    """Return a session's function that multiplies by a weight."""
    session = ggml.Session(["CPU"], n_threads=1)
    w = session.weight(weight)
    return session.compile(lambda x: ggml.mul(x, w))


class Crashes:
    """An object whose methods end the process in different ways."""

    def __init__(self, weight=None):
        self.weight = weight

    def same(self, x):
        return x

    def restored(self):
        return self.weight

    def ggml_assert(self):
        """Multiply matrices of sizes that do not fit, through the C layer, which ends the process."""
        logging.getLogger("isolated").warning("about to multiply")
        ctx = c.ggml_init({"mem_size": 1 << 20, "mem_buffer": c.NULL, "no_alloc": True})
        a, b = (c.ggml_new_tensor_2d(ctx, c.GGML_TYPE_F32, n, 2) for n in (3, 4))
        c.ggml_mul_mat(ctx, a, b)

    def abort(self):
        os.abort()

    def segfault(self):
        ctypes.string_at(0)

    def kill(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def leave(self):
        os._exit(3)

    def sys_exit(self):
        sys.exit(4)

    def fork_and_abort(self):
        """Abort, while a forked process stays alive with all open files."""
        if not os.fork():
            time.sleep(3)
            os._exit(0)
        os.abort()

    def hang(self, flag=None):
        """Hang, after making the file ``flag``."""
        if flag is not None:
            flag.touch()
        time.sleep(1000)

    def hang_in_c(self):
        ctypes.CDLL(None).sleep(1000)

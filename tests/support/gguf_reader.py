"""GGUF files read back for tests: by this package, and by ggml's own reader."""

from __future__ import annotations

import os

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import c


def read(path):
    """Return metadata and tensors of a file that is closed again."""
    with ggml.GGUFFile(path) as f:
        return dict(f.metadata), {name: np.array(f[name]) for name in f.tensors}


def as_lists(value):
    """Return nested arrays and tuples as lists."""
    return [as_lists(v) for v in value] if isinstance(value, list | tuple | np.ndarray) else value


class GgmlReader:
    """A GGUF file in ggml's own reader, which llama.cpp uses."""

    def __init__(self, path):
        params = c.ffi.new("struct gguf_init_params *", {"no_alloc": True, "ctx": c.NULL})
        self.ptr = c.gguf_init_from_file(os.fsencode(path), params[0])
        assert self.ptr, "ggml cannot read it"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        c.gguf_free(self.ptr)

    def find(self, key):
        return c.gguf_find_key(self.ptr, key.encode("utf-8", "surrogateescape"))

    def tensors(self):
        start = c.gguf_get_data_offset(self.ptr)
        return {
            c.ffi.string(c.gguf_get_tensor_name(self.ptr, i)).decode(): (
                c.gguf_get_tensor_type(self.ptr, i),
                start + c.gguf_get_tensor_offset(self.ptr, i),
                c.gguf_get_tensor_size(self.ptr, i),
            )
            for i in range(c.gguf_get_n_tensors(self.ptr))
        }

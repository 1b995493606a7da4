"""The graph for the tests of reports and drawings."""

import pytest

import ggml_cffi as ggml

NASTY = "<b> & \"x\" 'größe' 漢字 \x1b[31m\x07 ]]> \u202e"


@pytest.fixture
def net():
    """A graph with weights and a cache, markup in names, a view, an in-place node, and a node without elements."""

    class Net:
        def __init__(self, on):
            self.x = work.new_tensor("f32", (4, 16), name=NASTY)
            self.w = weights.new_tensor("f32", (8, 16), name="w")
            self.cache = weights.new_tensor("f32", (4, 8), name="cache")
            weights.alloc(on, [self.w], usage=ggml.Usage.WEIGHTS)
            weights.alloc(on, [self.cache])
            self.h = ggml.linear(self.x, self.w)
            self.view = ggml.reshape(ggml.relu(self.h), (8, 4))
            self.view.name = NASTY
            self.empty = ggml.scale(work.new_tensor("f32", (0, 4)), 2.0)
            self.y = ggml.scale_inplace(ggml.mul(ggml.scale(self.view, 2.0), ggml.transpose(self.cache)), 3.0)
            self.y.name = "y"

    with ggml.Context() as weights, ggml.Context() as work:
        yield Net

"""Contexts and tensors by C's names."""

from ggml_cffi import flat
from tests.support.flat_guide import F32


def test_sizes_are_in_the_order_of_c():
    ctx = flat.ggml_init(16 * 1024 * 1024)
    t = flat.ggml_new_tensor_3d(ctx, F32, 5, 3, 2)
    assert flat.ggml_tensor_shape(t) == (5, 3, 2, 1)
    assert t.shape == (2, 3, 5)
    assert flat.ggml_n_dims(t) == 3
    assert flat.ggml_nelements(t) == 30
    assert flat.ggml_nbytes(t) == 120
    assert flat.ggml_tensor_shape(flat.ggml_new_tensor(ctx, F32, 2, [7, 6])) == (7, 6, 1, 1)
    assert flat.ggml_get_name(flat.ggml_set_name(t, "weights")) == "weights"
    flat.ggml_free(ctx)

"""Sources of tensors: arrays, other files, encoded bytes and functions."""

import numpy as np
import pytest

import ggml_cffi as ggml
from tests.support import other_arrays
from tests.support.gguf_reader import read


def test_every_source_of_tensors_can_be_written(path, rng):
    x = rng.standard_normal((4, 64)).astype(np.float32)
    other = path.with_name("other.gguf")
    ggml.write_gguf(other, {}, {"x": x, "q": (x, "q5_0")})
    with ggml.GGUFFile(other) as f:
        sources = {
            "array": x,
            "list": [[1.0, 2.0], [3.0, 4.0]],
            "double": x.astype(np.float64),
            "transposed": x.T,
            "big-endian": x.astype(">f4"),
            "cast": (x, "f16"),
            "bf16": (x, ggml.BF16),
            "quantized": (x, "q8_0"),
            "scalar": np.float32(2.5),
            "from a file": f["q"],
            "decoded from a file": (f["q"], "f16"),
            "requantized": (f["x"], "q5_0"),
            "raw": ggml.RawTensor(ggml.quantize(x, "q4_0"), "q4_0"),
            "lazy": ggml.LazyTensor((4, 64), "q5_0", lambda: f["x"]),
            "lazy array": ggml.LazyTensor((4, 64), ggml.F32, lambda: x),
            "4d": np.arange(24, dtype=np.int32).reshape(2, 3, 2, 2),
        }
        ggml.write_gguf(path, {}, sources)
        want_q5 = f.raw("q").tobytes()
    with ggml.GGUFFile(path) as f:
        assert list(f.tensors) == list(sources)
        for name in ("array", "double", "big-endian", "lazy array"):
            assert f.tensors[name].dtype is ggml.F32
            np.testing.assert_array_equal(f.array(name), x)
        np.testing.assert_array_equal(f.array("transposed"), x.T)
        assert f.array("list").tolist() == [[1, 2], [3, 4]]
        np.testing.assert_array_equal(f.array("cast"), x.astype(np.float16))
        for name, dtype in (("bf16", ggml.BF16), ("quantized", ggml.Q8_0), ("raw", ggml.Q4_0)):
            assert f.tensors[name].dtype is dtype
            assert f.raw(name).tobytes() == ggml.quantize(x, dtype).tobytes()
        for name in ("from a file", "requantized", "lazy"):
            assert f.tensors[name].dtype is ggml.Q5_0
            assert f.raw(name).tobytes() == want_q5
        np.testing.assert_array_equal(
            f.array("decoded from a file"),
            ggml.dequantize(np.frombuffer(want_q5, np.uint8), "q5_0", (4, 64)).astype("f2"),
        )
        assert f.array("scalar") == 2.5
        assert f.array("4d").tolist() == sources["4d"].tolist()


def test_lazy_tensors_need_a_function():
    with pytest.raises(TypeError, match="takes a function that returns the values, not list"):
        ggml.LazyTensor((2,), "f32", [1.0, 2.0])


def test_encoded_bytes_are_a_tensor(rng):
    raw = ggml.quantize(rng.standard_normal((3, 4, 64)), "q4_0")
    t = ggml.RawTensor(raw, "q4_0")
    assert (t.shape, t.dtype, t.size) == ((3, 4, 64), ggml.Q4_0, 768)
    np.testing.assert_array_equal(np.asarray(t), ggml.dequantize(raw, "q4_0"))
    np.testing.assert_array_equal(ggml.RawTensor(raw.tobytes(), "q4_0", (12, 64)).numpy(), t.numpy().reshape(12, 64))
    assert not t.raw().flags.writeable
    assert raw.flags.writeable
    assert ggml.RawTensor(np.ones(3, np.float32), "f32").numpy().tolist() == [1, 1, 1]
    assert np.array(t, copy=True).flags.writeable
    with pytest.raises(ValueError, match="rows of 17 bytes do not fill whole Q4_0 blocks of 18"):
        ggml.RawTensor(bytes(17), "q4_0")
    with pytest.raises(ValueError, match=r"18 bytes are not a Q4_0 tensor of shape \(64,\)"):
        ggml.RawTensor(bytes(18), "q4_0", (64,))


class Bfloat16:
    """An array of bfloat16 as those of jax: numpy can read its bits only."""

    def __init__(self, values):
        self.bits = (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
        self.shape, self.dtype = self.bits.shape, "bfloat16"

    def __array__(self, dtype=None, copy=None):
        return self.bits


def test_bfloat16_arrays_are_written(path):
    by_dlpack = other_arrays.Parameter(other_arrays.Bfloat16([[1.0, -2.5]]))
    ggml.write_gguf(path, {}, {"t": Bfloat16([[1.0, -2.5]]), "half": (Bfloat16([1.0]), "f16"), "dlpack": by_dlpack})
    raw = ggml.quantize(other_arrays.Bfloat16(np.ones(32)), "q8_0")
    assert raw.tobytes() == ggml.quantize(np.ones(32), "q8_0").tobytes()
    with ggml.GGUFFile(path) as f:
        assert (f.tensors["dlpack"].dtype, f.array("dlpack").tolist()) == (ggml.BF16, [[1, -2.5]])
        assert (f.tensors["t"].dtype, f.array("t").tolist()) == (ggml.BF16, [[1, -2.5]])
        assert (f.tensors["half"].dtype, f.array("half").tolist()) == (ggml.F16, [1])


def test_pytorch_tensors_are_written(path):
    torch = pytest.importorskip("torch")
    w = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    ggml.write_gguf(path, {}, {"w": w, "b": w.detach().bfloat16(), "t": w.T})
    _, tensors = read(path)
    assert tensors["w"].tolist() == tensors["b"].tolist() == tensors["t"].T.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_sessions_accept_sources_as_weights(rng):
    x = rng.standard_normal((4, 64)).astype(np.float32)
    raw = ggml.quantize(x, "q8_0")
    with ggml.Session(["CPU"]) as s:
        w = s.weight(ggml.RawTensor(raw, "q8_0"))
        assert w.dtype is ggml.Q8_0
        np.testing.assert_array_equal(w.numpy(), ggml.dequantize(raw, "q8_0"))
        assert s.weight(Bfloat16([1.0, 2.0])).dtype is ggml.BF16


@pytest.mark.parametrize("order", "<>")
def test_the_order_of_bytes_does_not_change_the_type(order, tmp_path):
    for dtype, kept in (("f8", ggml.F32), ("f4", ggml.F32), ("f2", ggml.F16), ("i4", ggml.I32)):
        x = np.arange(8).reshape(2, 4).astype(order + dtype)
        with ggml.Session(["CPU"]) as s:
            for w in (s.weight(x), s.weight(x, copy=False)):
                assert w.dtype is kept
                np.testing.assert_array_equal(w.numpy(), x)
        ggml.write_gguf(tmp_path / "x.gguf", {}, {"w": x})
        with ggml.GGUFFile(tmp_path / "x.gguf") as file:
            assert file.tensors["w"].dtype is kept
            np.testing.assert_array_equal(file["w"].numpy(), x)


def test_encoded_bytes_in_another_order_are_refused():
    with pytest.raises(ValueError, match=r"in another order: use astype\('float32'\)"):
        ggml.RawTensor(np.ones(4, ">f4"), "f32", (4,))


def test_an_array_without_a_copy_is_a_view_or_an_error(tmp_path):
    x = np.ones((2, 32), np.float32)
    with ggml.Session(["CPU"]) as s:
        w = s.weight(x)
        view = np.asarray(w, copy=False)
        assert np.shares_memory(view, np.array(w, copy=False))
        view[0] = 5
        assert w.numpy()[0, 0] == 5
        with pytest.raises(ValueError, match="float32 cannot be viewed as float64 without a copy"):
            np.asarray(w, np.float64, copy=False)
        with pytest.raises(ValueError, match="numpy has no BF16"):
            np.asarray(s.weight(x, dtype="bf16"), copy=False)
    q = ggml.RawTensor(ggml.quantize(x, "q8_0"), "q8_0")
    with pytest.raises(ValueError, match="decoded into a copy: numpy has no Q8_0"):
        np.asarray(q, copy=False)
    plain = ggml.RawTensor(x, "f32")
    assert np.shares_memory(np.asarray(plain, copy=False), np.asarray(plain))

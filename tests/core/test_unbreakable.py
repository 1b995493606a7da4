"""Calls that once ended the process or returned wrong numbers: each now raises, or returns the right numbers."""

import mmap
import threading

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi import Type, models
from tests.support import gguf_writer, llama_float64, need, relative_error, run_python


@pytest.fixture
def ctx():
    with ggml.Context() as made:
        yield made


def made(ctx, dtype, shape, on="CPU", values=None):
    t = ctx.new_tensor(dtype, shape)
    ctx.alloc(on, [t])
    if values is not None:
        t.set(values)
    return t


def run(y, on=("CPU",)):
    with ggml.Scheduler(list(on)) as s, ggml.Graph(y) as g:
        s.alloc(g)
        s.compute(g)
        return y.numpy()


def test_views_made_before_allocation_can_be_written(ctx):
    x = ctx.new_tensor("f32", (4, 8))
    part, turned = ggml.view(x, (2, 8), offset=32), x.reshape(8, 4)
    ctx.alloc("CPU")
    part.set(np.ones((2, 8)))
    assert x.numpy().sum(1).tolist() == [0, 8, 8, 0]
    assert part.numpy().sum() == 16
    assert turned.numpy(copy=False).sum() == 16


def test_memory_that_no_backend_can_read_raises(ctx, two_gpus):
    for where, schedulers in ((two_gpus[0], ["CPU"]), (two_gpus[1], [two_gpus[0]])):
        y = ggml.relu(made(ctx, "f32", (4, 8), where))
        with pytest.raises(ValueError, match=f"is in {where}, which none of .* can read: add that device"):
            run(y, schedulers)


def test_a_leaf_placed_away_from_its_memory_raises(ctx, two_gpus):
    x = made(ctx, "f32", (4, 8))
    y = ggml.relu(x)
    with ggml.Scheduler(two_gpus) as s, ggml.Graph(y) as g:
        s.alloc(g)
        s.place(x, two_gpus[0])
        with pytest.raises(ValueError, match=f"was placed on {two_gpus[0]}, but has memory elsewhere"):
            s.alloc(g)
        s.unplace()
        s.compute(g)


def test_operations_on_unsupported_types_raise(ctx):
    for dtype in ("iq2_xxs", "iq1_s"):
        a, b = ctx.new_tensor(dtype, (2, 256)), ctx.new_tensor("f32", (2, 256))
        with pytest.raises(ValueError, match="ggml cannot quantize the sum"):
            ggml.add(a, b)
    rows = ctx.new_tensor("i32", (2,))
    for dtype in ("i8", "i16", "i64", "f64", "iq1_m"):
        with pytest.raises(ValueError, match="cannot convert rows"):
            ggml.set_rows(ctx.new_tensor(dtype, (2, 256)), ctx.new_tensor("f32", (2, 256)), rows)


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("dtype", [Type.IQ3_S, Type.IQ3_XXS, Type.IQ2_S, Type.Q4_K, Type.Q4_0], ids=lambda t: t.name)
def test_values_that_cannot_be_quantized_raise(ctx, dtype, value):
    x = np.ones((3, 256))
    x[:, ::7] = value
    with pytest.raises(ValueError, match="cannot be quantized"):
        made(ctx, dtype, (3, 256), values=x)


def test_views_that_overlap_raise(ctx):
    a = ctx.new_tensor("f32", (16,))
    for strides in ((4, 4), (0, 4)):
        with pytest.raises(ValueError, match="strides must not overlap"):
            ggml.view(a, (13, 4), strides=strides)


def test_row_numbers_are_checked_on_every_way_of_writing(ctx):
    """Row numbers are checked however they are written: through views, other contexts, graphs and new memory."""
    with ggml.Context() as other:
        a, r = made(ctx, "f32", (3, 8)), made(ctx, "i32", (4,))
        early = r.numpy(copy=False)
        y = ggml.get_rows(a, r)
        with pytest.raises(ValueError, match="read-only"):
            early[:] = 99999
        with pytest.raises(ValueError, match="3 rows"):
            ggml.view(r, (4,), ctx=other).set([99999] * 4)
        far = other.new_tensor("i32", (4,))
        other.alloc("CPU")
        y = ggml.get_rows(a, far)
        with ggml.Graph(y) as g:
            (leaf,) = [leaf for leaf in g.leaves if leaf == far]
            with pytest.raises(ValueError, match="3 rows"):
                leaf.set([99999] * 4)
        garbage = np.full(4096 + 64, 255, np.uint8)
        memory = garbage[-garbage.ctypes.data % 64 :][:4096]
        with ggml.Buffer.over(memory) as buffer:
            late = ctx.new_tensor("i32", (4,))
            ggml.get_rows(a, late)
            with pytest.raises(ValueError, match="3 rows"):
                ctx.put(late, buffer, buffer.base)
            assert not late.is_allocated
        with pytest.raises(ValueError, match="a has no rows"):
            ggml.get_rows(ctx.new_tensor("f32", (0, 8)), ctx.new_tensor("i32", (4,)))


def test_a_failed_allocation_leaves_tensors_as_they_were(ctx):
    t = ctx.new_tensor("f32", (2**20,))
    with pytest.raises(ValueError, match="listed twice"):
        ctx.alloc("CPU", [t, t])
    with pytest.raises(ValueError, match="no memory"):
        t.set(np.ones(2**20))
    huge = ctx.new_tensor("f32", (2**46,))
    with pytest.raises(ggml.OutOfMemoryError):
        ctx.alloc("CPU", [t, huge])
    with pytest.raises(ValueError, match="no memory"):
        t.numpy()
    ctx.alloc("CPU", [t])
    assert t.numpy().sum() == 0


def test_views_of_results_are_refused(ctx):
    y = ggml.relu(made(ctx, "f32", (64,)))
    with ggml.Scheduler(["CPU"]) as s, ggml.Graph(y) as g:
        s.compute(g)
        with pytest.raises(ValueError, match="in a scheduler's memory, which the next run reuses: take a copy"):
            y.numpy(copy=False)


def test_tensors_of_a_closed_buffer_raise(ctx):
    t = ctx.new_tensor("f32", (1024,))
    buffer = ggml.Buffer("CPU", 1 << 16)
    ctx.put(t, buffer, buffer.base)
    t.set(np.ones(1024))
    buffer.close()
    assert not t.is_allocated
    with pytest.raises(ValueError, match="no memory"):
        t.set(np.ones(1024))


def test_read_only_memory_cannot_be_written(ctx, tmp_path):
    path = tmp_path / "data"
    path.write_bytes(np.arange(1024, dtype=np.float32).tobytes())
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        t = ctx.new_tensor("f32", (1024,))
        buffer = ggml.Buffer.over(mapping)
        ctx.put(t, buffer, buffer.base)
        assert t.numpy()[-1] == 1023
        with pytest.raises(ValueError, match="read-only"):
            t.set(np.ones(1024))
        with pytest.raises(ValueError, match="read-only"):
            t.numpy(copy=False)[0] = 1
        with pytest.raises(ValueError, match="writes to memory that is read-only"):
            run(ggml.relu_inplace(t))
        buffer.close()
        del buffer


def test_weights_of_a_model_are_read_only(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    with models.load(path, ["CPU"]) as model:
        model.forward([1])
        (norm,) = [leaf for leaf in model.scheduler.graph.leaves if leaf.name == "output_norm.weight"]
        with pytest.raises(ValueError, match="read-only"):
            norm.set(np.ones(64))


def test_a_graph_without_nodes_raises(ctx):
    with pytest.raises(ValueError, match="nothing to compute"):
        ggml.Graph(ctx.new_tensor("f32", (4,)))


def test_a_refused_graph_marks_nothing(ctx, rng):
    values = rng.standard_normal((64, 64))
    x = made(ctx, "f32", (64, 64), values=values)
    h = ggml.relu(x)
    z = ggml.scale(ggml.scale(h, 2.0), 3.0)
    with ggml.Scheduler(["CPU"]) as s, ggml.Graph(z) as g:
        s.alloc(g)
        with pytest.raises(ValueError, match="a scheduler holds"):
            ggml.Graph(h)
        s.compute(g)
        with pytest.raises(ValueError, match="intermediate"):
            h.numpy()


def test_empty_and_huge_tensors(ctx):
    with pytest.raises(ValueError, match="no elements"):
        ggml.cast(ctx.new_tensor("f32", (0, 32)), "f16")
    for dtype, shape in (("f32", (2**31, 2**31)), ("f64", (2**60,))):
        with pytest.raises(ValueError, match=r"2\*\*62"):
            ctx.new_tensor(dtype, shape)
    long = ctx.new_tensor("f32", (2**31, 1))
    with pytest.raises(ValueError, match="mul_mat: the result is too large"):
        ggml.mul_mat(long, long)
    with pytest.raises(ValueError, match="inner size is 0"):
        ggml.mul_mat(ctx.new_tensor("f32", (3, 0)), ctx.new_tensor("f32", (2, 0)))
    for size in (0, 2**40, 1.5):
        with pytest.raises(ValueError, match="graph_size must be"):
            ggml.Scheduler(["CPU"], graph_size=size)


def test_strided_positions_are_used_correctly(ctx):
    p = ctx.new_tensor("i32", (6, 2))
    strided = ggml.transpose(ggml.view(p, (6, 1), strides=(8, 4)))
    with pytest.raises(ValueError, match="positions must be"):
        ggml.rope_ext(ctx.new_tensor("f32", (6, 2, 8)), strided, n_dims=8)


def test_quantized_tensors_cannot_be_transposed(ctx):
    a = ctx.new_tensor("q8_0", (2, 1, 32))
    for wrong in (lambda: ggml.transpose(a), lambda: ggml.permute(a, (2, 0, 1)), lambda: a.T):
        with pytest.raises(ValueError, match="must stay last"):
            wrong()
    assert ggml.permute(a, (1, 0, 2)).shape == (1, 2, 32)


VIEWS_ANYWHERE = {
    "soft_max": lambda x: ggml.soft_max(ggml.view(x, (3, 5), offset=4)),
    "argmax": lambda x: ggml.argmax(ggml.view(x, (4, 6), strides=(32, 4), offset=4)),
    "argsort": lambda x: ggml.argsort(ggml.view(x, (3, 5), offset=4)),
    "mul_mat": lambda x: ggml.mul_mat(ggml.view(x, (3, 4), strides=(32, 4), offset=4), ggml.view(x, (1, 4), offset=8)),
    "diag_mask_inf": lambda x: ggml.diag_mask_inf(ggml.reshape(ggml.view(x, (16,), offset=4), (4, 4))),
    "add": lambda x: ggml.add(ggml.view(x, (4, 6), strides=(32, 4), offset=4), ggml.view(x, (6,), offset=12)),
}


@pytest.mark.parametrize("name", VIEWS_ANYWHERE)
def test_views_that_start_anywhere_are_computed_on_the_cpu(devices, name, rng):
    """ggml's Vulkan backend ends the process on most of these operations, so the CPU computes them."""
    values = rng.standard_normal((4, 8)).astype(np.float32)
    found = []
    for on in (devices, ("CPU",)):
        with ggml.Session(on) as session:
            found.append(session.compile(VIEWS_ANYWHERE[name])(values))
    finite = np.isfinite(found[1])
    assert relative_error(found[0][finite], found[1][finite]) < 1e-3


def test_a_view_that_starts_anywhere_cannot_be_placed_on_a_gpu(ctx, two_gpus):
    y = ggml.soft_max(ggml.view(ctx.new_tensor("f32", (8,)), (4,), offset=4))
    with ggml.Scheduler(two_gpus) as s, ggml.Graph(y) as g:
        s.place(y, two_gpus[0])
        with pytest.raises(ggml.UnsupportedOpError, match="a view at an offset that GPUs do not support: use cont"):
            s.alloc(g)


def test_a_deep_graph_fits_a_threads_small_stack():
    done = run_python(
        "import threading, ggml_cffi as ggml\n"
        "threading.stack_size(256 * 1024)\n"
        "def work():\n"
        "    with ggml.Context() as ctx:\n"
        "        y = ctx.new_tensor('f32', (1,))\n"
        "        for _ in range(9000): y = ggml.relu(y)\n"
        "        with ggml.Graph(y) as g: print(len(g))\n"
        "t = threading.Thread(target=work); t.start(); t.join()\n"
    )
    assert done.stdout.strip() == "9000"


def test_placements_on_closed_contexts_are_forgotten(ctx):
    with ggml.Scheduler(["CPU"]) as s:
        with ggml.Context() as gone:
            s.place(ggml.relu(gone.new_tensor("f32", (2,))), "CPU")
        y = ggml.relu(ctx.new_tensor("f32", (2,)))
        with ggml.Graph(y) as g:
            s.compute(g)


# ---------------------------------------------------------------------- threads and forks


def in_threads(work, n=2):
    failures = []

    def guarded(k):
        try:
            work(k)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(k,)) for k in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures


def test_two_threads_compute_graphs_across_devices(two_gpus):
    """ggml's transfers between GPUs share a buffer without a lock."""

    def work(k):
        rng = np.random.default_rng(k)
        with ggml.Context() as ctx, ggml.Scheduler(two_gpus) as s:
            x = ctx.new_tensor("f32", (16, 16))
            y = ggml.scale(x, 2.0)
            s.place(y, two_gpus[1])
            with ggml.Graph(y) as g:
                s.alloc(g)
                for _ in range(200):
                    values = rng.integers(-3, 4, (16, 16)).astype(np.float32)
                    x.set(values)
                    s.compute()
                    np.testing.assert_array_equal(y.numpy(), 2 * values)

    in_threads(work)


def test_two_threads_may_use_a_gpu_first():
    (gpu,) = need(("Vulkan0",))
    done = run_python(
        "import threading, ggml_cffi as ggml\n"
        "def work():\n"
        "    with ggml.Context() as ctx:\n"
        f"        ctx.new_tensor('f32', (16, 16)); ctx.alloc({gpu!r})\n"
        "ts = [threading.Thread(target=work) for _ in range(4)]\n"
        "[t.start() for t in ts]; [t.join() for t in ts]; print('ok')\n"
    )
    assert done.stdout.strip() == "ok"


@pytest.mark.parametrize("close", ["context", "buffer"])
def test_closing_while_another_thread_reads_is_safe(close):
    for _ in range(5):
        with ggml.Context() as ctx:
            x = made(ctx, "f32", (2**22,))
            started = threading.Event()

            def read(x=x, started=started):
                try:
                    while True:
                        x.numpy()
                        started.set()
                except (ggml.ClosedError, ValueError):
                    pass

            reader = threading.Thread(target=read)
            reader.start()
            started.wait(10)
            (ctx if close == "context" else ctx.buffers[0]).close()
            reader.join(10)
            assert not reader.is_alive()


def test_a_read_while_its_buffer_closes_keeps_the_memory(monkeypatch):
    kept = []
    with ggml.Context() as ctx:
        x = made(ctx, "f32", (8,))
        buffer = ctx.buffers[0]
        owner = buffer.owner
        tensors = ggml.Context.tensors

        def read_first(self):
            kept.append(x.check_readable())  # as another thread, which has the processor now
            return tensors(self)

        monkeypatch.setattr(ggml.Context, "tensors", read_first)
        buffer.close()
        assert len(kept) == 1
        assert owner in kept[0]
        with pytest.raises(ValueError, match="has no memory"):
            x.numpy()


def test_closing_a_model_while_it_computes_is_safe(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    for _ in range(5):
        with models.load(path, ["CPU"]) as model:
            started = threading.Event()

            def work(model=model, started=started):
                try:
                    while True:
                        model.forward(range(40))
                        started.set()
                except ggml.GgmlError:
                    pass

            worker = threading.Thread(target=work)
            worker.start()
            started.wait(10)
            model.close()
            worker.join(10)
            assert not worker.is_alive()


def test_gpu_tensors_in_a_forked_child_raise():
    (gpu,) = need(("Vulkan0",))
    done = run_python(
        "import warnings; warnings.simplefilter('ignore')\n"
        "import os, signal, ggml_cffi as ggml\n"
        "ctx = ggml.Context()\n"
        f"x = ctx.new_tensor('f32', (4,)); ctx.alloc({gpu!r})\n"
        "y = ctx.new_tensor('f32', (4,))\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    signal.alarm(20)\n"
        f"    for use in (x.numpy, lambda: ctx.alloc({gpu!r}, [y])):\n"
        "        try: use()\n"
        "        except ggml.GgmlError as error: print(error, flush=True)\n"
        "    os._exit(0)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
        "ctx.close()\n"
    )
    assert "opened before a fork" in done.stdout
    assert "forked process" in done.stdout


# ---------------------------------------------------------------------- files

SMALL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [chr(97 + i) for i in range(20)],
    "tokenizer.ggml.merges": ["a b"],
}
BROKEN = {
    "tokenizer.ggml.token_type": 5,
    "tokenizer.ggml.pre": [1],
    "tokenizer.ggml.tokens": [1],
    "tokenizer.ggml.merges": 7,
}


@pytest.mark.parametrize("key", BROKEN)
def test_broken_vocabularies_raise(tmp_path, rng, key):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, **(SMALL | {key: BROKEN[key]}))
    with models.load(path, ["CPU"]) as model, pytest.raises(ggml.FormatError):
        model.tokenize("abc")


def test_a_vocabulary_shorter_than_the_embeddings_raises(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, **SMALL)
    with models.load(path, ["CPU"]) as model:
        assert isinstance("".join(model.generate("abc", 30, temperature=2.0, seed=1)), str)


def test_more_layers_than_tensors_raise(tmp_path, rng):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng, **{"llama.block_count": 2**31 - 1})
    with pytest.raises(ggml.FormatError, match="layers, but the file has only"):
        models.load(path, ["CPU"])


@pytest.mark.parametrize("dtype", [Type.I32, Type.F64, Type.I8], ids=lambda t: t.name)
def test_weights_of_impossible_types_raise(tmp_path, rng, dtype):
    path = llama_float64.random_model(tmp_path / "m.gguf", rng)
    with ggml.GGUFFile(path) as f:
        tensors = {name: (f.tensors[name].dtype, f.array(name)) for name in f.tensors}
        meta = dict(f.metadata)
    tensors["blk.0.ffn_up.weight"] = (dtype, np.zeros(tensors["blk.0.ffn_up.weight"][1].shape, np.int8))
    gguf_writer.write(path, meta, tensors)
    with pytest.raises(ggml.FormatError, match=r"blk.0.ffn_up.weight.*which no weight can have"):
        models.load(path, ["CPU"])


@pytest.mark.parametrize(
    "template", ["{{ 1 + 'a' }}", "{% include 'x' %}", "{{ 1 / 0 }}", "{{ range(10**9) }}", "{{ strftime_now(5) }}"]
)
def test_broken_templates_raise(template):
    from ggml_cffi.models.generation.chat import ChatTemplate

    with pytest.raises(ggml.FormatError, match="chat template failed"):
        ChatTemplate(template).render([])


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda ctx, t: ggml.device(None), TypeError),
        (lambda ctx, t: ggml.Scheduler([None]), TypeError),
        (lambda ctx, t: ctx.alloc("CPU", [5]), TypeError),
        (lambda ctx, t: ggml.relu(t, ctx="a"), TypeError),
        (lambda ctx, t: ggml.add(ctx.new_tensor("q8_0", (32,)), 5), TypeError),
        (lambda ctx, t: ggml.Buffer("CPU", 64, usage=99), ValueError),
        (lambda ctx, t: ggml.Backend("CPU", n_threads=1.5), ValueError),
        (lambda ctx, t: setattr(t, "name", "a\0b"), ValueError),
    ],
)
def test_arguments_of_wrong_types_raise(ctx, wrong, error):
    t = ctx.new_tensor("f32", (4,))
    with pytest.raises(error):
        wrong(ctx, t)


def test_products_of_float_matrices_on_gpus_are_accurate_to_f16(devices, rng):
    """Vulkan rounds the operands of large products to F16."""
    a, b = rng.standard_normal((64, 256)), rng.standard_normal((16, 256))
    with ggml.Context() as ctx:
        x, y = ctx.new_tensor("f32", a.shape), ctx.new_tensor("f32", b.shape)
        out = ggml.mul_mat(x, y)
        with ggml.Scheduler(devices) as s, ggml.Graph(out) as g:
            s.alloc(g)
            x.set(a)
            y.set(b)
            s.compute()
            assert relative_error(out.numpy(), b @ a.T) < 5e-3


def test_schedulers_of_other_threads_come_and_go_while_a_graph_is_made(ctx):
    """A new graph is compared with all held graphs, to which another thread may add one meanwhile."""
    x = ctx.new_tensor("f32", (4,))

    class Nodes(frozenset):
        def isdisjoint(self, other):
            ctx.held[object()] = frozenset()
            return True

    ctx.held[object()] = Nodes()
    try:
        ggml.Graph(ggml.relu(x)).close()
        assert len(ctx.held) == 2
    finally:
        ctx.held.clear()

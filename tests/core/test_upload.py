"""Uploads by several threads: every byte arrives, progress is reported, and an error ends the upload."""

from __future__ import annotations

import numpy as np
import pytest

import ggml_cffi as ggml
from ggml_cffi.core import upload as uploads
from ggml_cffi.core.upload import Job, upload


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Make chunks so small that the small tensors of these tests have several."""
    monkeypatch.setattr(uploads, "CHUNK", 1 << 16)
    monkeypatch.setattr(uploads, "THREADS_PAY", 1)


@pytest.fixture
def backends():
    found = [ggml.Backend(device) for device in ggml.devices()]
    yield found
    for backend in found:
        backend.close()


def jobs_on(ctx, backends, rng):
    """Return jobs of odd sizes on all devices, some from columns of wider arrays; and the tensors' expected values."""
    jobs, wanted = [], []
    for backend in backends:
        for rows, columns in ((300, 256), (1000, 65), (7, 3), (1, 1)):
            for wide in (False, True):
                t = ctx.new_tensor(ggml.F32, (rows, columns))
                ctx.alloc(backend.buffer_type, [t])
                values = rng.standard_normal((rows, columns * (1 + wide)), dtype=np.float32)
                data = values.view(np.uint8)
                jobs.append(Job(t, data[:, columns * 4 :] if wide else data.reshape(-1)))
                wanted.append((t, values[:, columns:] if wide else values))
    return jobs, wanted


@pytest.mark.parametrize("threads", [1, 3])
def test_every_byte_arrives(backends, rng, monkeypatch, threads):
    monkeypatch.setattr(uploads, "default_threads", lambda: threads * len(backends))
    seen = []
    with ggml.Context() as ctx:
        jobs, wanted = jobs_on(ctx, backends, rng)
        upload(jobs, backends, lambda *args: seen.append(args))
        for t, values in wanted:
            np.testing.assert_array_equal(t.numpy(), values)
    total = sum(job.data.size for job in jobs)
    assert seen == sorted(seen)
    assert seen[-1] == (total, total)
    if len(backends) > 1:  # only uploads to GPUs are divided into chunks
        assert len(seen) > len(jobs)


def test_tensors_of_a_device_without_a_backend_are_uploaded(backends, rng):
    with ggml.Context() as ctx:
        jobs, wanted = jobs_on(ctx, backends, rng)
        upload(jobs, [])
        for t, values in wanted:
            np.testing.assert_array_equal(t.numpy(), values)


def test_row_numbers_are_checked(backends):
    with ggml.Context() as ctx:
        for backend in backends:
            table, rows = ctx.new_tensor(ggml.F32, (4, 8)), ctx.new_tensor(ggml.I32, (2,))
            ctx.alloc(backend.buffer_type, [table, rows])
            ggml.ops.get_rows(table, rows)
            with pytest.raises(ValueError, match="row"):
                upload([Job(rows, np.array([0, 4], np.int32).view(np.uint8))], backends)


def test_an_exception_of_progress_ends_the_upload(backends, rng):
    def stop(done, total):
        raise KeyboardInterrupt

    with ggml.Context() as ctx:
        jobs, wanted = jobs_on(ctx, backends, rng)
        with pytest.raises(KeyboardInterrupt):
            upload(jobs, backends, stop)
        upload(jobs, backends)  # a new upload works
        for t, values in wanted:
            np.testing.assert_array_equal(t.numpy(), values)


def test_an_error_in_an_upload_thread_is_raised_in_the_caller(backends, rng, monkeypatch):
    if len(backends) < 2:
        pytest.skip("needs a Vulkan device")

    def fail(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(uploads, "copy_bytes", fail)
    with ggml.Context() as ctx:
        jobs, _ = jobs_on(ctx, backends[:1], rng)
        with pytest.raises(MemoryError, match="no room"):
            upload(jobs, backends)

"""AMX: the trial of ggml's kernels in a process of its own, and its answer in the cache folder."""

import stat
import sys

import pytest

from ggml_cffi.core.buffer import BufferType
from ggml_cffi.core.repack import repacked_memories
from ggml_cffi.models.runners import amx


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GGML_CFFI_CACHE", str(tmp_path / "cache"))
    amx.amx_works.cache_clear()
    yield
    amx.amx_works.cache_clear()


@pytest.fixture
def with_amx(monkeypatch):
    """Take the CPU's ordinary memory for AMX's, so that its products are those without AMX."""
    monkeypatch.setattr(amx, "repacked_memories", lambda: {"AMX": BufferType.of("CPU")})


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Return a function that replaces the program of the trial by a shell script."""

    def use(script):
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\necho started >> {tmp_path}/starts\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(program))

    return use


def starts(tmp_path):
    file = tmp_path / "starts"
    return file.read_text().count("started") if file.exists() else 0


def test_products_with_amx_are_those_without_it():
    if "AMX" not in repacked_memories():
        pytest.skip("the processor or the library has no AMX")
    if amx.amx_works():
        amx.check_products()


def test_no_trial_is_made_without_amx(monkeypatch, child, tmp_path):
    monkeypatch.setattr(amx, "repacked_memories", lambda: {"CPU_REPACK": BufferType.of("CPU")})
    child("exit 0")
    assert not amx.amx_works()
    assert not amx.path().exists()
    assert starts(tmp_path) == 0


def test_the_trial_multiplies_by_weights_of_every_type(with_amx):
    amx.check_products()


def test_wrong_products_are_reported(with_amx, monkeypatch):
    right = amx.ops.mul_mat
    n_calls = 0

    def wrong(weight, x):
        nonlocal n_calls
        n_calls += 1
        return amx.ops.scale(right(weight, x), 1.1 if n_calls == 4 else 1)

    monkeypatch.setattr(amx.ops, "mul_mat", wrong)
    with pytest.raises(ArithmeticError, match="products of 3 rows by Q4_0 weights are wrong with AMX"):
        amx.check_products()


@pytest.mark.parametrize(
    ("script", "works", "reason"),
    [
        ("echo works", True, ""),
        ("echo a line of sitecustomize; echo works", True, ""),
        ("kill -SEGV $$", False, "ggml's products with it end the process (signal 11)"),
        ("echo first >&2; echo ArithmeticError: wrong >&2; exit 1", False, "ArithmeticError: wrong"),
    ],
    ids=["works", "another line", "a signal", "wrong products"],
)
def test_one_trial_answers_until_the_machine_starts_again(with_amx, child, tmp_path, caplog, script, works, reason):
    child(script)
    for _ in range(2):
        assert amx.amx_works() is works
        amx.amx_works.cache_clear()
    assert starts(tmp_path) == 1
    expected = [] if works else [("WARNING", f"weights are not arranged for AMX: {reason}")]
    assert [(record.levelname, record.message) for record in caplog.records] == expected


@pytest.mark.parametrize("text", ["", "works", "another library works", "\0\xff"])
def test_the_answer_of_another_library_is_not_used(with_amx, child, tmp_path, text):
    amx.path().parent.mkdir(parents=True)
    amx.path().write_text(text, encoding="latin-1")
    child("exit 1")
    assert not amx.amx_works()
    assert starts(tmp_path) == 1


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 0", "the trial failed"),
        ("echo it works; exit 0", "the trial failed"),
        ("exit 3", "the trial failed"),
        ("kill -KILL $$", "ggml's products with it end the process (signal 9)"),
        (r"echo ImportError: '\377' >&2; exit 1", "ImportError: \N{REPLACEMENT CHARACTER}"),
    ],
    ids=["another program", "its text", "a silent failure", "killed from outside", "an import"],
)
def test_a_trial_without_an_answer_is_made_again(with_amx, child, tmp_path, caplog, script, reason):
    child(script)
    assert not amx.amx_works()
    assert [record.message for record in caplog.records] == [f"weights are not arranged for AMX: {reason}"]
    amx.amx_works.cache_clear()
    child("echo works")
    assert amx.amx_works()
    assert starts(tmp_path) == 2


@pytest.mark.parametrize("name", ["missing", "", None])
def test_a_program_that_cannot_be_started_means_no_amx(with_amx, monkeypatch, tmp_path, caplog, name):
    monkeypatch.setattr(sys, "executable", name and str(tmp_path / name))
    assert not amx.amx_works()
    assert ("the trial could not be made" if name else "the trial needs Python") in caplog.text
    assert not amx.path().exists()


def test_a_frozen_program_is_not_started(with_amx, child, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    child("echo works")
    assert not amx.amx_works()
    assert starts(tmp_path) == 0


def test_a_program_that_a_trial_started_makes_no_trial(with_amx, child, tmp_path):
    child(f'test "$GGML_CFFI_AMX_TRIAL" = 1 && echo works >> {tmp_path}/marks')
    assert not amx.amx_works()
    assert (tmp_path / "marks").exists()


def test_the_trial_of_a_trial_is_not_made(with_amx, child, monkeypatch, tmp_path):
    monkeypatch.setenv("GGML_CFFI_AMX_TRIAL", "1")
    child("echo works")
    assert not amx.amx_works()
    assert starts(tmp_path) == 0


def test_the_trial_runs_python(with_amx, monkeypatch, caplog):
    """Here the child finds no AMX, unless the processor has it."""
    assert amx.amx_works() or "KeyError: 'AMX'" in caplog.text or "AMX" in repacked_memories()


def test_no_home_folder_is_needed(with_amx, child, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("GGML_CFFI_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.home", no_home)
    child("echo works")
    assert amx.amx_works()


def test_a_cache_folder_that_cannot_be_written_means_a_trial_each_time(with_amx, child, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GGML_CFFI_CACHE", str(tmp_path / "file" / "cache"))
    child("echo works")
    for _ in range(2):
        assert amx.amx_works()
        amx.amx_works.cache_clear()
    assert starts(tmp_path) == 2

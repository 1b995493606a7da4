"""Generated files, compared with the headers."""

import pytest

import ggml_cffi
from codegen import declarations, headers, operations
from codegen.__main__ import stale
from codegen.versions import ROOT
from ggml_cffi import c, enums
from ggml_cffi.c import library


@pytest.fixture(scope="module")
def parsed():
    return declarations.merged()


def test_generated_files_are_up_to_date():
    assert stale() == {}


def test_every_public_function_is_bound_or_skipped_with_a_reason(parsed):
    assert len(parsed.functions) > 650
    names = {f.name for f in parsed.functions}
    assert set(headers.SKIPPED) <= names
    assert names - set(headers.SKIPPED) == {name for name in dir(c) if name.startswith(("ggml_", "gguf_"))}
    report = (ROOT / "codegen" / "report.md").read_text()
    assert all(f"| `{name}` |" in report for name in names)


def test_every_bound_function_is_in_its_library(parsed):
    plugins = [p for p in library.PLUGINS if not library.available(p)]
    names = [f.name for f in parsed.functions if f.name not in headers.SKIPPED and f.library not in plugins]
    assert len(names) > 600
    for name in names:
        if library.provides(name):
            assert callable(getattr(c, name)), name
        else:
            with pytest.raises(ggml_cffi.LibraryMismatchError, match=rf"{name} needs ggml 0\.\d+\.\d or newer"):
                getattr(c, name)


def test_every_c_builder_has_an_operation_or_a_reason(parsed):
    """Check every function of ggml.h that creates a tensor."""
    made = {f.name for f in operations.builders(parsed)}
    bound = operations.bound()
    assert len(made) > 230
    assert set(operations.LEFT_OUT) <= made
    assert made - set(bound) == set(operations.LEFT_OUT)
    assert not set(bound) & set(operations.LEFT_OUT)


def test_every_operation_names_its_c_function(parsed):
    names = {f.name for f in parsed.functions}
    bound = operations.bound()
    assert set(bound) <= names
    functions = {n for m in operations.modules() for n in m.exported if n in m.functions}
    assert functions - {n for found in bound.values() for n in found} == set()


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no_such_function"):
        c.no_such_function  # noqa: B018
    assert "ggml_add" in dir(c)


def test_constants_and_enums_agree(parsed):
    assert c.GGML_TYPE_Q4_K == enums.Type.Q4_K == 12
    assert enums.Status.ALLOC_FAILED == -2
    assert enums.TensorFlag.INPUT | enums.TensorFlag.OUTPUT == 3
    assert c.GGML_MAX_DIMS == 4
    assert c.GGUF_MAGIC == "GGUF"
    for members in parsed.enums.values():
        for name, value in members.items():
            assert getattr(c, name) == parsed.varying.get(name, {}).get(library.declarations(), value)

"""Generated files, compared with the headers; declarations, compared with the layout of the C compiler."""

import shutil
import subprocess

import pytest

from codegen import headers, operations
from codegen.__main__ import stale
from ggml_cffi import c, enums
from ggml_cffi.c import library


@pytest.fixture(scope="module")
def parsed():
    return headers.read()


def test_generated_files_are_up_to_date():
    assert stale() == {}


def test_every_public_function_is_bound_or_skipped_with_a_reason(parsed):
    assert len(parsed.functions) > 650
    names = {f.name for f in parsed.functions}
    assert set(headers.SKIPPED) <= names
    assert names - set(headers.SKIPPED) == {name for name in dir(c) if name.startswith(("ggml_", "gguf_"))}
    report = (headers.ROOT / "codegen" / "report.md").read_text()
    assert all(f"| `{name}` |" in report for name in names)


def test_every_bound_function_is_in_its_library(parsed):
    plugins = [p for p in library.PLUGINS if not library.available(p)]
    names = [f.name for f in parsed.functions if f.name not in headers.SKIPPED and f.library not in plugins]
    assert len(names) > 600
    for name in names:
        assert callable(getattr(c, name)), name


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
            assert getattr(c, name) == value


def test_structs_have_the_layout_of_the_c_compiler(parsed, tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("needs a C compiler")
    includes = "".join(f'#include "{name}"\n' for name in headers.HEADERS)
    body, ours = [], []
    for struct, fields in parsed.structs.items():
        body.append(f'printf("%zu\\n", sizeof({struct}));')
        ours.append((struct, c.ffi.sizeof(struct)))
        for name in fields:
            body.append(f'printf("%zu\\n", offsetof({struct}, {name}));')
            ours.append((f"{struct}.{name}", c.ffi.offsetof(struct, name)))
    source = tmp_path / "probe.c"
    source.write_text(f"{includes}#include <stddef.h>\n#include <stdio.h>\nint main(void) {{ {' '.join(body)} }}\n")
    include = headers.source_dir() / "include"
    subprocess.run([compiler, f"-I{include}", "-o", tmp_path / "probe", source], check=True)
    output = subprocess.run([tmp_path / "probe"], capture_output=True, text=True, check=True).stdout
    theirs = [int(line) for line in output.split()]
    assert len(ours) > 80
    assert [(name, n) for (name, _), n in zip(ours, theirs, strict=True)] == ours

"""Declarations of several versions of ggml, and the one layer over them."""

import dataclasses
import json

import pytest

from codegen import declarations, versions
from ggml_cffi import c


@pytest.fixture(scope="module")
def stored():
    return [declarations.stored(v) for v in versions.supported()]


def test_every_version_has_a_file_of_its_declarations(stored):
    assert [h.version for h in stored] == ["0.20.2", "0.25.3", "0.27.0"]
    assert all(len(h.functions) > 650 for h in stored)


def test_the_layer_covers_all_versions_and_tells_the_first_version_of_a_function(stored):
    merged = declarations.merge(stored)
    names = {f.name for f in merged.functions}
    assert all({f.name for f in h.functions} <= names for h in stored)
    assert merged.newest_built == versions.newest_with_source().name
    assert merged.since("ggml_add") == "0.20.2"
    assert merged.since("ggml_swiglu_clamp") == "0.25.3"
    assert merged.since("ggml_backend_sched_set_realloc_callback") == "0.27.0"
    assert [f.name for f in merged.newer["0.27.0"]] == [
        "ggml_backend_buft_alloc_buffer_n",
        "ggml_backend_buft_get_alloc_size_n",
        "ggml_backend_sched_set_copy_callback",
        "ggml_backend_sched_set_realloc_callback",
    ]


def test_constants_that_differ_between_versions_have_all_values(stored):
    assert declarations.merge(stored).varying["GGML_GLU_OP_COUNT"] == {"0.20.2": 6, "0.25.3": 7, "0.27.0": 7}


@pytest.mark.parametrize("version", [v.name for v in versions.supported()])
def test_structs_have_the_layout_of_each_versions_compiler(version):
    structs = declarations.stored(next(v for v in versions.supported() if v.name == version)).structs
    assert len(structs) > 10
    for struct, layout in structs.items():
        assert c.ffi.sizeof(struct) == layout[""], struct
        for field, offset in layout.items():
            if field:
                assert c.ffi.offsetof(struct, field) == offset, (struct, field)


def test_a_function_with_another_signature_is_incompatible(stored):
    old, new = stored[0], stored[-1]
    changed = [dataclasses.replace(f, returns="int") if f.name == "ggml_add" else f for f in new.functions]
    with pytest.raises(declarations.IncompatibleError, match=r"ggml_add has another signature in ggml 0.27.0"):
        declarations.merge([old, dataclasses.replace(new, functions=changed)])


def test_a_struct_with_another_layout_is_incompatible(stored):
    old, new = stored[0], stored[-1]
    larger = new.structs | {"struct ggml_tensor": new.structs["struct ggml_tensor"] | {"": 400}}
    with pytest.raises(declarations.IncompatibleError, match="struct ggml_tensor has another layout"):
        declarations.merge([old, dataclasses.replace(new, structs=larger)])


def test_an_enum_with_another_number_is_incompatible(stored):
    """Python's enums have one number for each member, whatever version is loaded."""
    old, new = stored[0], stored[-1]
    inserted = new.enums["ggml_op"] | {"GGML_OP_NEW": 31, "GGML_OP_OUT_PROD": 32}
    with pytest.raises(declarations.IncompatibleError, match=r"GGML_OP_OUT_PROD has another number in ggml 0\.27\.0"):
        declarations.merge([old, dataclasses.replace(new, enums=new.enums | {"ggml_op": inserted})])


def test_a_version_without_headers_keeps_its_stored_declarations(monkeypatch, tmp_path):
    def fail(version):
        raise versions.MissingHeadersError("the mirror has a newer package")

    monkeypatch.setattr(declarations, "read", fail)
    files, missing = declarations.files()
    assert files == {}
    assert missing["0.27.0"] == "the mirror has a newer package"


def test_a_versions_file_is_what_its_headers_declare():
    newest = versions.newest_with_source()
    files, missing = declarations.files()
    if newest.name in missing:
        pytest.skip(missing[newest.name])
    name = f"codegen/declarations/{newest.name}.json"
    assert json.loads(files[name])["version"] == newest.name
    assert (versions.ROOT / name).read_text() == files[name]

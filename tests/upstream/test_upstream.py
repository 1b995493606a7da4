"""Sample of upstream's cases, CPU against Vulkan; ``python -m benchmarks.upstream`` runs all of them."""

from __future__ import annotations

import pytest

from tests.support import PATIENCE, need
from tests.upstream import listing, refusals, runner
from tests.upstream.builders import load
from tests.upstream.text import parse

PER_OP, MAX_WORK = 2, 600_000
#: Operations with another shader per type: only F32 is tested, since a software GPU compiles each for long.
TYPED = {"MUL_MAT", "MUL_MAT_ID", "FLASH_ATTN_EXT"}
#: Operations with shaders that compile slowly: one case each.
HEAVY = {"CONV_2D", "CONV_TRANSPOSE_2D", "FLASH_ATTN_EXT", "MUL_MAT_ID", "SOFT_MAX", "TOP_K"}


@pytest.fixture(scope="module")
def listed() -> list[listing.Listed]:
    try:
        return listing.cases()
    except listing.NoListError as error:
        pytest.skip(str(error))


def test_every_listed_operation_has_a_builder(listed):
    assert {case.op for case in listed} <= set(load())
    assert len(listed) > 19_000


def test_the_list_of_another_version_is_read_from_a_file(tmp_path):
    table = tmp_path / "cases.csv"
    table.write_text(
        '"backend_name","op_name","op_params","test_mode","supported","error_message","backend_reg_name"\n'
        '"CPU","GET_ROWS","type=f32,n=8,m=5,r=4,be1=1,be2=1,v=1,vs0=1,offset_cols=3","support","1","yes","CPU"\n'
    )
    (case,) = listing.cases(table)
    assert (case.op, case.on_cpu, parse(case.text).offset_cols) == ("GET_ROWS", True, 3)
    (outcome,) = runner.run([case], ["CPU"], max_work=MAX_WORK, timeout=PATIENCE)
    assert outcome.status == runner.RAN, outcome.detail


def test_a_case_with_an_unknown_parameter_is_missing():
    case = listing.Listed(0, "SQR", "type=f32,ne=[8,1,1,1],sparse=1", True)
    (outcome,) = runner.run([case], ["CPU"], max_work=MAX_WORK, timeout=PATIENCE)
    assert (outcome.status, outcome.detail) == (runner.MISSING, "unknown parameters: sparse")


def test_parameters_are_read():
    p = parse("type=q4_K,ne=[10,5,4,3],eps=0.000001,mode=bicubic|align_corners,v=1,split")
    assert (p.type, p.ne, p.eps, p.mode, p.v, p.split) == (
        "q4_K",
        (10, 5, 4, 3),
        1e-6,
        "bicubic|align_corners",
        1,
        True,
    )


@pytest.mark.parametrize("group", ["convolutions", "elementwise", "products", "sequences", "shape"])
def test_cpu_and_vulkan_agree_as_upstream_asks(listed, group):
    devices = ("CPU", *need(("Vulkan0",)))
    chosen = [case for case in listed if load()[case.op].__module__.endswith(group) and quick(case)]
    heavy = [case for case in chosen if case.op in HEAVY]
    sample = runner.spread([case for case in chosen if case.op not in HEAVY], PER_OP, smaller=0.3)
    sample += runner.spread(heavy, 1, smaller=0.3)
    outcomes = list(runner.run(sample, devices, max_work=MAX_WORK, timeout=PATIENCE))
    good = (runner.AGREED, runner.UNSUPPORTED, runner.LARGE)
    bad = [o for o in outcomes if o.status not in good and not refusals.reason(o)]
    assert not bad, "\n".join(f"{o.op}({o.text}) {o.status}: {o.detail}" for o in bad)
    assert sum(o.status == runner.AGREED for o in outcomes) > len(outcomes) // 3


def quick(case: listing.Listed) -> bool:
    # Tables for types of 3 bits and less take seconds to build.
    types = [value for name, value in parse(case.text).named.items() if "type" in name.lower()]
    quickly = all(t == "f32" for t in types) if case.op in TYPED else "=iq" not in case.text
    return case.on_cpu and quickly

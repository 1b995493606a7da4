"""Sample of upstream's cases, CPU against Vulkan; ``python -m benchmarks.upstream`` runs all of them."""

from __future__ import annotations

import pytest

from tests.support import PATIENCE, need
from tests.upstream import listing, runner
from tests.upstream.builders import load
from tests.upstream.text import parse

PER_OP, MAX_WORK = 2, 600_000
#: Operations with another shader per type: only F32 is tested, since a software GPU compiles each for long.
TYPED = {"MUL_MAT", "MUL_MAT_ID", "FLASH_ATTN_EXT"}
#: Operations with shaders that compile slowly: one case each.
HEAVY = {"CONV_2D", "CONV_TRANSPOSE_2D", "FLASH_ATTN_EXT", "MUL_MAT_ID", "SOFT_MAX", "TOP_K"}
#: Parts of the messages for cases that ggml_cffi refuses although upstream lists them for the CPU.
REFUSED = (
    "cannot be checked",  # row numbers by a view
    "integers, which may be checked row numbers, cannot be written in place",  # they may be row numbers
    "of one type that is not quantized",  # concat
    "quantized tensors are copied to and from tensors of the same shape",
    "quantized tensors, and the rows of other tensors, must be contiguous",
    "a must be F32, F16, BF16 or I32",  # dup of I16
    "with an even last size",  # gated units of an odd size, whose last element has no effect
    "a must be F32 with contiguous rows",  # norms and sums of transposed tensors
    "the kernel and the rows of x must be contiguous",  # conv_2d of one channel, permuted
    "is larger than the padded input",  # convolutions: C rounds a negative number of windows up to one
    "that hold padding only",  # pooling
    "must be multiples of channels=",  # im2col_3d of kernels and inputs with a part of their channels
    "one number per row",  # get_rows_back of more rows than there are numbers
    "ext_factor needs n_ctx_orig",  # YaRN's ramp from the logarithm of 0
    "freq_factors must be F32 of one axis with at least",  # the CPU reads more values than upstream provides
)


@pytest.fixture(scope="module")
def listed() -> list[listing.Listed]:
    try:
        return listing.cases()
    except listing.NoListError as error:
        pytest.skip(str(error))


def test_every_listed_operation_has_a_builder(listed):
    assert {case.op for case in listed} <= set(load())
    assert len(listed) > 19_000


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
    bad = [o for o in outcomes if o.status not in good and not expected(o)]
    assert not bad, "\n".join(f"{o.op}({o.text}) {o.status}: {o.detail}" for o in bad)
    assert sum(o.status == runner.AGREED for o in outcomes) > len(outcomes) // 3


def quick(case: listing.Listed) -> bool:
    # Tables for types of 3 bits and less take seconds to build.
    types = [value for name, value in vars(parse(case.text)).items() if "type" in name.lower()]
    quickly = all(t == "f32" for t in types) if case.op in TYPED else "=iq" not in case.text
    return case.on_cpu and quickly


def expected(outcome: runner.Outcome) -> bool:
    return outcome.status == runner.REFUSED and any(part in outcome.detail for part in REFUSED)

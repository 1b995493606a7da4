"""Reasons for which ggml_cffi refuses cases that upstream lists for the CPU."""

from __future__ import annotations

from tests.upstream.runner import REFUSED, Outcome

#: Part of the message, and the reason in words.
REASONS = {
    "cannot be checked": "row numbers by a view",
    "integers, which may be checked row numbers, cannot be written in place": "integers may be row numbers",
    "quantized tensors are copied to and from tensors of the same shape": "copies of quantized tensors",
    "quantized tensors, and the rows of other tensors, must be contiguous": "copies of quantized tensors",
    "a must be F32, F16, BF16 or I32": "dup of I16",
    "with an even last size": "gated units of an odd size, whose last element has no effect",
    "sum: a must be F32 and contiguous": "sums of permuted tensors",
    "the kernel and the rows of x must be contiguous": "conv_2d of one channel, permuted",
    "is larger than the padded input": "convolutions: C rounds a negative number of windows up to one",
    "kernel has no elements": "convolutions with an empty kernel",
    "that hold padding only": "pooling of padding",
    "must be multiples of channels=": "im2col_3d of kernels and inputs with a part of their channels",
    "one number per row": "get_rows_back of more rows than there are numbers",
    "ext_factor needs n_ctx_orig": "YaRN's ramp from the logarithm of 0",
    "solve_tri: a has more than 64 rows": "more rows than GPUs solve",
    "swiglu_clamp needs a limit": "cases that the program of 0.20.2 lists for an operation that it does not know",
    # Cases of newer lists, with what not every supported version can.
    "mul_mat_id: a, b and the rows of ids must be contiguous": "experts with gaps between them",
    "kernel starts inside another tensor": "convolutions with a kernel at an odd address",
    "rms_norm: sizes before the last must be at most 65535": "more rows than Vulkan allows",
}


def reason(outcome: Outcome) -> str | None:
    """Return the reason of a refusal in words; None if the case was not refused, or for a reason not listed here."""
    if outcome.status != REFUSED:
        return None
    return next((words for part, words in REASONS.items() if part in outcome.detail), None)

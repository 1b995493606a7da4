"""Texts that llama.cpp generated, compared as far as rounding allows.

llama.cpp's CPU kernels and ggml's here round activations to 8 bits, and each version and each processor has kernels of
its own. A token is therefore decided only if its logit leads by more than rounding can take away.
"""

from __future__ import annotations

from typing import Any

import numpy as np

#: The lead from which on kernels with activations of 8 bits must agree. At the tokens of the files in ``tests/data``,
#: leads of llama.cpp and of ggml (SSE 4.2, AVX2, AVX-512) differ from those of exact arithmetic by up to 0.63 (SmolLM2)
#: and 0.83 (Gemma 3), and from one another by up to 0.72.
ROUNDED = 1.0
#: The same for kernels that keep activations in floating point, compared with exact arithmetic.
EXACT = 0.1

Case = dict[str, Any]
"""A case of a file: ``tokens`` of the prompt, ``greedy`` tokens after it, and ``margins``, the lead of each."""


def decided(case: Case, margin: float) -> list[int]:
    """Return the greedy tokens before the first one that another kernel may decide differently."""
    return case["greedy"][: next((i for i, m in enumerate(case["margins"]) if m < margin), len(case["margins"]))]


def assert_follows(got: list[int], case: Case, margin: float) -> int:
    """Check that ``got`` leaves a case's greedy tokens, if at all, at an undecided one; return the common length."""
    for i, (a, b) in enumerate(zip(got, case["greedy"], strict=False)):
        if a != b:
            assert case["margins"][i] < margin, f"token {i} is {a}, not {b}, which leads by {case['margins'][i]}"
            return i
    return len(got)


def assert_decides(logits: np.ndarray, case: Case, margin: float) -> None:
    """Check the most likely token after each prefix of a case's text, where it is decided.

    Parameters
    ----------
    logits
        ``(n, n_vocab)``: those of the last token of the prompt, and of each greedy token but the last.
    """
    clear = np.array(case["margins"][: len(logits)]) >= margin
    assert clear.sum() >= len(logits) / 2, "half of the tokens or more must be decided"
    np.testing.assert_array_equal(logits.argmax(-1)[clear], np.array(case["greedy"][: len(logits)])[clear])

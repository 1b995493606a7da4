"""Output of commands: tables, progress bars and sizes."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from ggml_cffi.core.text import table

if TYPE_CHECKING:
    from ggml_cffi.models import Model
    from ggml_cffi.models.runners.weights import Progress


def placement(model: Model) -> str:
    """A table of what each device holds."""
    rows = [("device", "layers", "weights", "KV cache", "compute")]
    for share in model.placement:
        layers = f"{share.layers[0]}-{share.layers[-1]}" if share.layers else "-"
        what = [layers, *["output"] * share.has_output, *["embeddings"] * share.has_embeddings]
        text = " + ".join(w for w in what if w != "-") or "-"
        rows.append(
            (share.backend.name, text, mib(share.weight_bytes), mib(share.cache_bytes), mib(share.compute_bytes))
        )
    return table(rows, right=(2, 3, 4))


def speed(model: Model) -> str:
    """One line on the last answer's speed."""
    t = model.timings
    reused = f" ({t.reused_tokens} of them reused)" if t.reused_tokens else ""
    return (
        f"prompt: {t.prompt_tokens} tokens{reused}, {t.prompt_rate:.1f} tokens/s; "
        f"decode: {t.decoded_tokens} tokens, {t.decode_rate:.1f} tokens/s"
    )


def progress_bar(what: str) -> AbstractContextManager[Progress | None]:
    """A progress bar on standard error, nothing where that is no terminal."""
    return _Bar(what) if sys.stderr.isatty() else nullcontext()


class _Bar(AbstractContextManager["Progress | None"]):
    def __init__(self, what: str) -> None:
        from tqdm import tqdm

        self.bar = tqdm(desc=what, unit="B", unit_scale=True, unit_divisor=1024, leave=False)

    def __enter__(self) -> Progress:
        return self.update

    def update(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def gib(n: int) -> str:
    """Bytes as GiB."""
    return f"{n / 2**30:.1f} GiB"


def mib(n: int) -> str:
    """Bytes as MiB."""
    return f"{n / 2**20:.1f} MiB"

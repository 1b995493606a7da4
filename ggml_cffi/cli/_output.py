"""Output of several commands: progress bars, and the placement and the speed of a model as text."""

from __future__ import annotations

import codecs
import io
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

from ggml_cffi.core.text import size, table

if TYPE_CHECKING:
    from ggml_cffi.core.progress import Progress
    from ggml_cffi.models import Model


def print_error(error: Exception) -> None:
    """Print an error as one line on standard error."""
    reason = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    lines = [line.strip() for line in reason.splitlines() if line.strip()]
    print(f"ggml-cffi: {'; '.join(lines)}", file=sys.stderr)


def replace_unwritable() -> None:
    """Write a replacement for characters that the terminal's encoding lacks; read one for bytes that are no text."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def writes_unicode() -> bool:
    """Return whether standard output can write every character."""
    return codecs.lookup(sys.stdout.encoding or "ascii").name.startswith("utf")


def placement_table(model: Model) -> str:
    """Return a table of the layers and bytes that each device holds."""
    rows = [("device", "layers", "weights", "KV cache", "compute")]
    for p in model.placement:
        parts = [f"{p.layers[0]}-{p.layers[-1]}"] if p.layers else []
        parts += [*["output"] * p.has_output, *["embeddings"] * p.has_embeddings]
        row = (p.device, " + ".join(parts) or "-", size(p.weight_bytes), size(p.cache_bytes))
        rows.append((*row, size(p.compute_bytes)))
    return table(rows, right=(2, 3, 4))


def speed_line(model: Model) -> str:
    """Return one line about the speed of the last answer."""
    t = model.timings
    reused = f" ({t.reused_tokens} of them reused)" if t.reused_tokens else ""
    return (
        f"prompt: {t.prompt_tokens} tokens{reused}, {t.prompt_rate:.1f} tokens/s; "
        f"decode: {t.decoded_tokens} tokens, {t.decode_rate:.1f} tokens/s"
    )


def progress_bar(label: str, unit: str = "B") -> AbstractContextManager[Progress | None]:
    """Return a context manager that shows a progress bar on standard error, if that is a terminal.

    It yields the function ``progress(done, total)``, or None without a terminal.

    Parameters
    ----------
    label
        The text before the bar.
    unit
        Unit of the numbers: bytes, or another such as ``"tok"``.
    """
    return _Bar(label, unit) if sys.stderr.isatty() else nullcontext()


@contextmanager
def notice_line(text: str) -> Iterator[None]:
    """Show a line on standard error, a terminal, while the block runs."""
    from tqdm import tqdm

    line = tqdm(desc=text, bar_format="{desc}", leave=False)
    try:
        yield
    finally:
        line.close()


class _Bar(AbstractContextManager["Progress | None"]):
    def __init__(self, label: str, unit: str) -> None:
        from tqdm import tqdm

        divisor = 1024 if unit == "B" else 1000
        self.bar = tqdm(desc=label, unit=unit, unit_scale=True, unit_divisor=divisor, leave=False)

    def __enter__(self) -> Progress:
        return self.update

    def update(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        self.bar.close()

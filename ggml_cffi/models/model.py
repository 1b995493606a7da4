"""Models that generate text."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ggml_cffi._handle import Closing
from ggml_cffi.backend import Backend
from ggml_cffi.device import Device, devices
from ggml_cffi.errors import FormatError
from ggml_cffi.gguf import GGUFFile
from ggml_cffi.models.architecture import Architecture
from ggml_cffi.models.chat import Message, render
from ggml_cffi.models.gemma3 import Gemma3
from ggml_cffi.models.llama import Llama
from ggml_cffi.models.qwen2 import Qwen2
from ggml_cffi.models.qwen3 import Qwen3
from ggml_cffi.models.runner import Runner
from ggml_cffi.models.sampling import Sampler
from ggml_cffi.models.tokenizer import Tokenizer, check_tokens
from ggml_cffi.models.weights import Progress, Share
from ggml_cffi.scheduler import Scheduler

#: Architectures by their name in GGUF. A new one is one more file, and a line here.
ARCHITECTURES: dict[str, type[Architecture]] = {cls.name: cls for cls in (Gemma3, Llama, Qwen2, Qwen3)}

_DEFAULT_CTX = 4096


@dataclass
class Timings:
    """Counts and seconds of the last call of ``generate``."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    decoded_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Decoded tokens per second."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0


class Model(Closing):
    """A model on its devices. Made by :func:`load`; a context manager.

    One call of :meth:`forward` or :meth:`generate` at a time: they share one cache.
    """

    def __init__(
        self,
        file: GGUFFile,
        architecture: Architecture,
        backends: list[Backend],
        n_ctx: int,
        n_batch: int,
        progress: Progress | None,
    ) -> None:
        self._file, self._backends = file, backends
        self.architecture = architecture
        """Sizes and graph of the model."""
        self.n_ctx = n_ctx
        """Most tokens of prompt and answer together."""
        self.n_batch = min(n_batch, n_ctx)
        """Most prompt tokens computed at once."""
        self.timings = Timings()
        """Of the last call of :meth:`generate`."""
        self._tokenizer: Tokenizer | None = None
        self._runner = Runner(architecture, backends, n_ctx, self.n_batch, progress)

    # ------------------------------------------------------------------ text

    @property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary, read when it is first used.

        Raises
        ------
        FormatError
            If the file has none, or one of an unsupported kind.
        """
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self._file)
        return self._tokenizer

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of ``text``; see :meth:`Tokenizer.encode`."""
        return self.tokenizer.encode(text, special=special)

    def detokenize(self, ids: Iterable[int]) -> str:
        """The text of token ids; see :meth:`Tokenizer.decode`."""
        return self.tokenizer.decode(ids)

    @property
    def chat_template(self) -> str | None:
        """The model's Jinja template for chats, None if it has none."""
        template = self._file.metadata.get("tokenizer.chat_template")
        return template if isinstance(template, str) else None

    def apply_chat_template(self, messages: Sequence[Message]) -> str:
        """The text of a chat, ready for the model's answer.

        Raises
        ------
        FormatError
            If the model has no chat template.
        """
        if self.chat_template is None:
            raise FormatError(f"{self._file.path} has no chat template: give the prompt as text")
        tokenizer = self.tokenizer
        bos, eos = (
            tokenizer.token_bytes(t, special=True).decode("utf-8", "replace") if t is not None else ""
            for t in (tokenizer.bos, tokenizer.eos)
        )
        return render(self.chat_template, messages, bos=bos, eos=eos)

    # ------------------------------------------------------------------ numbers

    def forward(self, tokens: Iterable[int], *, last: bool = False) -> npt.NDArray[np.float32]:
        """Logits for ``tokens`` from an empty cache.

        Parameters
        ----------
        tokens
            1 to ``n_ctx`` token ids.
        last
            Only the last token's logits.

        Returns
        -------
        numpy.ndarray
            float32, ``(n_tokens, n_vocab)``; ``(n_vocab,)`` if ``last``.

        Raises
        ------
        ValueError
            If there are no tokens, more than fit the context, or ids out of range.
        """
        ids = self._checked(tokens)
        runner = self._runner
        turn = runner.begin()
        if last:
            return runner.feed(turn, ids)
        return np.concatenate([runner.step(turn, batch, at, len(batch)) for batch, at in runner.batches(ids)])

    def generate(
        self,
        prompt: str | Sequence[Message],
        max_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 0.95,
        seed: int | None = None,
    ) -> Iterator[str]:
        """Continue a text, or answer a chat; yields pieces of text as they are decided.

        Parameters
        ----------
        prompt
            Text, or messages for the model's chat template.
        max_tokens
            Most tokens to add; default until the model ends, or the context is full.
        temperature, top_k, top_p, seed
            See :class:`~ggml_cffi.models.sampling.Sampler`. Temperature 0 is greedy.

        Raises
        ------
        ValueError
            If the prompt does not fit the context, or a parameter is out of range. Raised by the call itself.
        GgmlError
            While iterating, if another call on this model came between.
        """
        text = prompt if isinstance(prompt, str) else self.apply_chat_template(prompt)
        return self._texts(
            self.generate_tokens(
                self.tokenize(text), max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
            )
        )

    def _texts(self, tokens: Iterator[int]) -> Iterator[str]:
        stream = self.tokenizer.stream()
        for token in tokens:
            piece = stream.push(token)
            if piece:
                yield piece
        rest = stream.finish()
        if rest:
            yield rest

    def generate_tokens(
        self,
        tokens: Iterable[int],
        max_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 0.95,
        seed: int | None = None,
        stop_at_end: bool = True,
    ) -> Iterator[int]:
        """As :meth:`generate`, from and to token ids. ``stop_at_end=False`` goes on after an end token."""
        sampler = Sampler(temperature, top_k, top_p, seed)
        if max_tokens is not None and max_tokens < 0:
            raise ValueError(f"max_tokens must be at least 0, not {max_tokens}")
        ids = self._checked(tokens)
        ends = self.tokenizer.ends if stop_at_end else frozenset[int]()
        return self._decode(ids, max_tokens, sampler, ends)

    def _decode(self, ids: list[int], max_tokens: int | None, sampler: Sampler, ends: frozenset[int]) -> Iterator[int]:
        runner = self._runner
        turn = runner.begin()
        timings = self.timings = Timings(prompt_tokens=len(ids))
        start = time.perf_counter()
        logits = runner.feed(turn, ids)
        timings.prompt_seconds = time.perf_counter() - start
        at = len(ids)
        for _ in range(self.n_ctx - at + 1 if max_tokens is None else max_tokens):
            token = sampler(logits)
            if token in ends:
                return
            yield token
            if at >= self.n_ctx:
                return
            start = time.perf_counter()
            logits = runner.step(turn, [token], at, 1)[0]
            timings.decode_seconds += time.perf_counter() - start
            timings.decoded_tokens += 1
            at += 1

    # ------------------------------------------------------------------ the rest

    @property
    def shares(self) -> list[Share]:
        """What each device holds: layers, bytes of weights, caches and intermediate results."""
        return self._runner.weights.shares

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler; it holds the graph of the last run.

        Raises
        ------
        ClosedError
            If the model is closed.
        """
        return self._runner.scheduler

    def layer_backend(self, layer: int) -> Backend:
        """The backend where a layer's weights are."""
        return self._backends[self._runner.weights.where[layer]]

    def _checked(self, tokens: Iterable[int]) -> list[int]:
        ids = check_tokens(tokens, self.architecture.n_vocab)
        if not ids:
            raise ValueError("there are no tokens: the prompt is empty")
        if len(ids) > self.n_ctx:
            raise ValueError(f"{len(ids)} tokens do not fit the context of {self.n_ctx}")
        return ids

    def close(self) -> None:
        """Free everything. Closing twice is allowed."""
        for part in (self._runner, *self._backends, self._file):
            part.close()

    def __repr__(self) -> str:
        return f"<Model {os.path.basename(self._file.path)}{' closed' if self._runner.closed else ''}>"


def load(
    path: str | os.PathLike[str],
    devices: Sequence[Device | str] | None = None,
    split: str = "layer",
    n_ctx: int | None = None,
    *,
    n_batch: int = 512,
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> Model:
    """Load a model from a GGUF file onto devices.

    Parameters
    ----------
    path
        The file.
    devices
        Devices or names; default every GPU. The CPU is added last: it holds the embeddings, and the layers that the
        GPUs have no room for.
    split
        ``"layer"``: whole layers, in proportion to free memory.
    n_ctx
        Most tokens of prompt and answer together; default what the model was trained for, at most 4096.
    n_batch
        Most prompt tokens computed at once.
    n_threads
        Threads of the CPU; default all that this process may use.
    progress
        Called with bytes done and bytes in all.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    FormatError
        If the file is malformed, or its architecture is unknown.
    ValueError
        If a device does not exist or a parameter is out of range.
    OutOfMemoryError
        If the devices have not enough memory.
    """
    if split != "layer":
        raise ValueError(f"split {split!r} is not known; 'layer' is")
    if n_batch < 1:
        raise ValueError(f"n_batch must be at least 1, not {n_batch}")
    file = GGUFFile(path)
    backends: list[Backend] = []
    try:
        architecture = _architecture(file)
        limit = architecture.n_ctx_train
        if n_ctx is not None and not 1 <= n_ctx <= limit:
            raise ValueError(f"n_ctx must be 1 to {limit}, the context that the model was trained for, not {n_ctx}")
        backends = _backends(devices, n_threads)
        return Model(file, architecture, backends, n_ctx or min(limit, _DEFAULT_CTX), n_batch, progress)
    except BaseException:
        for backend in backends:
            backend.close()
        file.close()
        raise


def _architecture(file: GGUFFile) -> Architecture:
    name: Any = file.metadata.get("general.architecture")
    cls = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if cls is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise FormatError(f"{file.path}: architecture {name!r} is not supported; {known} are")
    return cls(file)


def _backends(chosen: Sequence[Device | str] | None, n_threads: int | None) -> list[Backend]:
    if isinstance(chosen, str | Device):
        raise TypeError("devices is a sequence: put the one device in a list")
    names = [d for d in devices() if d.type.name in ("GPU", "IGPU")] if chosen is None else list(chosen)
    opened: list[Backend] = []
    try:
        for which in names:
            backend = Backend(which)
            opened.append(backend)
        if any(b.device.is_cpu for b in opened[:-1]):
            raise ValueError("the CPU comes last: it takes what no device before it has room for")
        if not opened or not opened[-1].device.is_cpu:
            opened.append(Backend("CPU"))
        if n_threads is not None:
            opened[-1].n_threads = n_threads
    except BaseException:
        for backend in opened:
            backend.close()
        raise
    return opened

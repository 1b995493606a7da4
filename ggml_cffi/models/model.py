"""Models that generate text."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from ggml_cffi.backend import Backend
from ggml_cffi.context import Context
from ggml_cffi.device import Device, devices
from ggml_cffi.enums import Type
from ggml_cffi.errors import ClosedError, FormatError, GgmlError
from ggml_cffi.gguf import GGUFFile
from ggml_cffi.graph import Graph
from ggml_cffi.models.architecture import Architecture, Inputs
from ggml_cffi.models.chat import Message, render
from ggml_cffi.models.llama import Llama
from ggml_cffi.models.sampling import Sampler
from ggml_cffi.models.tokenizer import Tokenizer, check_tokens
from ggml_cffi.models.weights import Progress, Share, Weights
from ggml_cffi.scheduler import Scheduler
from ggml_cffi.tensor import Tensor

#: Architectures by their name in GGUF. A new one is one more file, and a line here.
ARCHITECTURES: dict[str, type[Architecture]] = {cls.name: cls for cls in (Llama,)}

_T = TypeVar("_T")
_DEFAULT_CTX = 4096
_FEW_TOKENS = 8  # ggml's Vulkan backend has products of their own for up to so many columns
_KV_STEP = 256  # attention looks at a multiple of this many cache rows, so that one graph serves many tokens


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


@dataclass
class _Run:
    """A graph that is allocated in the scheduler, and replayed for as long as its sizes fit."""

    key: tuple[int, int, int]
    context: Context
    inputs: Inputs
    graph: Graph
    logits: Tensor

    def close(self) -> None:
        self.graph.close()
        self.context.close()


class Model:
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
        self._cache_rows = -(-n_ctx // _KV_STEP) * _KV_STEP
        self._tokenizer: Tokenizer | None = None
        self._run: _Run | None = None
        self._turn = 0
        self._weights: Weights | None = None
        self._scheduler: Scheduler | None = None
        try:
            self._weights = Weights(architecture, backends, self._cache_rows, progress=progress)
            self._scheduler = Scheduler(backends)
            self._reserve()
        except BaseException:
            self.close()
            raise

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
        self._turn += 1
        if last:
            return self._feed(ids, 0)
        return np.concatenate([self._step(batch, at, len(batch)) for batch, at in self._batches(ids, 0)])

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
        self._turn += 1
        turn = self._turn
        timings = self.timings = Timings(prompt_tokens=len(ids))
        start = time.perf_counter()
        logits = self._feed(ids, 0)
        timings.prompt_seconds = time.perf_counter() - start
        at = len(ids)
        for _ in range(self.n_ctx - at + 1 if max_tokens is None else max_tokens):
            token = sampler(logits)
            if token in ends:
                return
            yield token
            if at >= self.n_ctx:
                return
            if turn != self._turn:
                raise GgmlError("another forward or generate call has used this model's cache meanwhile")
            start = time.perf_counter()
            logits = self._step([token], at, 1)[0]
            timings.decode_seconds += time.perf_counter() - start
            timings.decoded_tokens += 1
            at += 1

    def _feed(self, ids: list[int], at: int) -> npt.NDArray[np.float32]:
        """Compute ``ids`` from position ``at`` on; the last one's logits ``(n_vocab,)``."""
        logits = np.empty(0, np.float32)
        for batch, start in self._batches(ids, at):
            logits = self._step(batch, start, 1)[0]
        return logits

    def _batches(self, ids: list[int], at: int) -> Iterator[tuple[list[int], int]]:
        """``ids`` in parts of about equal size, at most ``n_batch`` each, with their positions.

        A few tokens go one by one where there is a GPU: every small batch size is a set of shaders of its own, which
        the driver compiles for seconds; those for one token are needed anyway.
        """
        n = len(ids)
        gpu = not self._backends[0].device.is_cpu
        parts = n if gpu and n <= _FEW_TOKENS else -(-n // self.n_batch)
        edges = [n * i // parts for i in range(parts + 1)]
        for start, end in pairwise(edges):
            yield ids[start:end], at + start

    def _step(self, ids: list[int], at: int, n_out: int) -> npt.NDArray[np.float32]:
        """One run over ``ids`` at positions from ``at``; logits of the last ``n_out``: ``(n_out, n_vocab)``."""
        n = len(ids)
        n_kv = min(-(-(at + n) // _KV_STEP) * _KV_STEP, self._cache_rows)
        run = self._prepared((n, n_kv, n_out))
        positions = np.arange(at, at + n)
        inputs = run.inputs
        inputs.tokens.set(np.asarray(ids, np.int32))
        inputs.positions.set(positions.astype(np.int32))
        inputs.rows.set(positions)
        inputs.mask.set(np.where(np.arange(n_kv) <= positions[:, None], np.float16(0), np.float16(-np.inf)))
        inputs.wanted.set(np.arange(n - n_out, n, dtype=np.int32))
        self._open(self._scheduler).compute(run.graph)
        logits: npt.NDArray[np.float32] = run.logits.numpy()
        return logits

    def _prepared(self, key: tuple[int, int, int]) -> _Run:
        """The graph for ``n`` tokens, ``n_kv`` cache rows and ``n_out`` logits, allocated; the last one is kept."""
        if self._run is not None and self._run.key == key:
            return self._run
        self._drop_run()
        self._run = run = self._build(key)
        self._open(self._scheduler).alloc(run.graph)
        return run

    def _build(self, key: tuple[int, int, int]) -> _Run:
        n, n_kv, n_out = key
        weights, scheduler = self._open(self._weights), self._open(self._scheduler)
        context = Context()
        inputs = Inputs(
            tokens=context.new_tensor(Type.I32, (n,), name="tokens"),
            positions=context.new_tensor(Type.I32, (n,), name="positions"),
            rows=context.new_tensor(Type.I64, (n,), name="rows"),
            mask=context.new_tensor(Type.F16, (n, n_kv), name="mask"),
            wanted=context.new_tensor(Type.I32, (n_out,), name="wanted"),
        )
        logits = self.architecture.build(weights.tensors, weights.cache, inputs)
        logits.name = "logits"
        run = _Run(key, context, inputs, Graph(logits), logits)
        # Token ids go where the embeddings are.
        scheduler.unplace()
        scheduler.place(inputs.tokens, scheduler.backends[-1])
        return run

    def _reserve(self) -> None:
        """Make room for the largest prompt batch now, so that too little memory is found while loading."""
        run = self._build((self.n_batch, self._cache_rows, 1))
        try:
            sizes = self._open(self._scheduler).reserve(run.graph)
        finally:
            run.close()
        for share in self.shares:
            share.compute_bytes = sizes[share.backend]

    # ------------------------------------------------------------------ the rest

    @property
    def shares(self) -> list[Share]:
        """What each device holds: layers, bytes of weights, caches and intermediate results."""
        return self._open(self._weights).shares

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler; it holds the graph of the last run."""
        return self._open(self._scheduler)

    def layer_backend(self, layer: int) -> Backend:
        """The backend where a layer's weights are."""
        return self._backends[self._open(self._weights).where[layer]]

    def _checked(self, tokens: Iterable[int]) -> list[int]:
        ids = check_tokens(tokens, self.architecture.n_vocab)
        if not ids:
            raise ValueError("there are no tokens: the prompt is empty")
        if len(ids) > self.n_ctx:
            raise ValueError(f"{len(ids)} tokens do not fit the context of {self.n_ctx}")
        return ids

    def _open(self, part: _T | None) -> _T:
        if part is None:
            raise ClosedError("this model is closed")
        return part

    def _drop_run(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            if self._scheduler is not None:
                self._scheduler.reset()
            run.close()

    def close(self) -> None:
        """Free everything. Closing twice is allowed."""
        self._turn += 1
        self._drop_run()
        for part in (self._scheduler, self._weights, *self._backends, self._file):
            if part is not None:
                part.close()
        self._scheduler = self._weights = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Model {os.path.basename(self._file.path)}{' closed' if self._weights is None else ''}>"


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
        raise FormatError(f"{file.path}: architecture {name!r} is not supported; {', '.join(ARCHITECTURES)} is")
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

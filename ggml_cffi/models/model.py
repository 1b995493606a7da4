"""Models that generate text."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TypedDict, Unpack, overload

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.backend import Backend, open_backends
from ggml_cffi.core.device import Device
from ggml_cffi.core.dtypes import as_type
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.errors import FormatError
from ggml_cffi.files.gguf.reader import GGUFFile
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.architectures.registry import architecture_of, context_of
from ggml_cffi.models.generation import kv_snapshot as state
from ggml_cffi.models.generation.batcher import Generator, Timings
from ggml_cffi.models.generation.chat import Message, render
from ggml_cffi.models.generation.detokenize import Pieces, pieces, stop_strings
from ggml_cffi.models.generation.requests import Request, Stream, follow, follow_everywhere
from ggml_cffi.models.generation.sampling import Sampler
from ggml_cffi.models.load import open_runners
from ggml_cffi.models.perplexity import Perplexity, perplexity
from ggml_cffi.models.placement.arrange import Arrangement, Balance, Wish
from ggml_cffi.models.placement.auto import Use
from ggml_cffi.models.placement.plan import ModelPlan, Planner, check_options
from ggml_cffi.models.runners.base import Runner
from ggml_cffi.models.runners.embedding import Embedder, embed_everywhere
from ggml_cffi.models.runners.weights import DevicePlacement, Progress
from ggml_cffi.models.tokenizers.tokenizer import Tokenizer, check_tokens
from ggml_cffi.scheduler.scheduler import Scheduler

#: Messages of one chat.
Chat = Sequence[Message]


class Options(TypedDict, total=False):
    """What :meth:`Model.generate` takes besides the prompt and the number of tokens."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: int
    seed: int | None
    stop: str | Sequence[str] | None
    reuse: bool
    max_sequences: int


class Model(Closing):
    """A model on its devices. Made by :func:`load`; a context manager.

    Calls from several threads share its runs and its cache: several texts grow at once.
    """

    def __init__(
        self,
        file: GGUFFile,
        architecture: Architecture,
        backends: list[Backend],
        wish: Wish,
        progress: Progress | None,
        arrangement: Arrangement,
        plan: ModelPlan,
    ) -> None:
        self._file, self._backends = file, backends
        self.architecture = architecture
        """Sizes and graph of the model."""
        self.plan = plan
        """What was planned before loading: what is where, and why."""
        n_ctx, n_batch = wish.n_ctx, wish.n_batch
        self.n_ctx = n_ctx
        """Most tokens of prompt and answer together."""
        self.n_batch = min(n_batch, n_ctx)
        """Most tokens computed at once."""
        self.timings = Timings()
        """Of the call of :meth:`generate` that began last."""
        self._tokenizer: Tokenizer | None = None
        self._runners: list[Runner] = []
        self._generators: list[Generator] = []
        self._embedders: list[Embedder] = []
        software = any("llvmpipe" in b.device.description for b in backends)
        try:
            for runner in open_runners(architecture, backends, wish, progress, arrangement):
                self._runners.append(runner)
                self._generators.append(Generator(runner, n_ctx, one_by_one=software))
                if runner.placed is not None:
                    self._embedders.append(Embedder(architecture, runner.placed, runner.scheduler, n_ctx, n_batch))
                    if not architecture.causal:
                        self._reserve(self._embedders[-1])
        except BaseException:
            for generator in self._generators:
                generator.close()
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
        """Logits for ``tokens``, as a text of their own.

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
        generator = self._choose()
        if last:
            last_row: npt.NDArray[np.float32] = generator.logits(ids, 1)[0]
            return last_row
        return generator.logits(ids, len(ids))

    def perplexity(
        self, text: str | Iterable[int], *, n_ctx: int = 512, progress: Progress | None = None
    ) -> Perplexity:
        """How well the model foretells a text, as llama.cpp's ``perplexity`` counts it.

        The text is cut into windows of ``n_ctx`` tokens; what is left at the end is not used. In each window, whose
        first token is replaced by the beginning token where the model has one, the tokens of the second half are
        scored, each from all before it.

        Parameters
        ----------
        text
            Text, or token ids.
        n_ctx
            Tokens of a window, at least 2; no more than the context of the model.
        progress
            Called with tokens done and tokens in all.

        Raises
        ------
        ValueError
            If ``n_ctx`` is below 2, the text is shorter than one window, or an id is out of range.
        """
        ids = self.tokenize(text) if isinstance(text, str) else check_tokens(text, self.architecture.n_vocab)
        return perplexity(self._choose(), ids, min(n_ctx, self.n_ctx), self._bos(), progress)

    def _bos(self) -> int | None:
        kind = self._file.metadata.get("tokenizer.ggml.model", "no_vocab")
        return self.tokenizer.bos if kind != "no_vocab" and self.tokenizer.add_bos else None

    # ------------------------------------------------------------------ texts that grow

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: str | Chat, max_tokens: int | None = None, **options: Unpack[Options]
    ) -> Iterator[str]: ...
    @overload
    def generate(
        self, prompt: Sequence[str] | Sequence[Chat], max_tokens: int | None = None, **options: Unpack[Options]
    ) -> Iterator[tuple[int, str]]: ...
    def generate(
        self,
        prompt: str | Chat | Sequence[str] | Sequence[Chat],
        max_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        reuse: bool = True,
        max_sequences: int = 16,
    ) -> Iterator[str] | Iterator[tuple[int, str]]:
        """Continue a text, or answer a chat; yields pieces of text as they are decided.

        Closing the iterator, or leaving it, ends the text.

        Parameters
        ----------
        prompt
            Text, or messages for the model's chat template. Several of either in a list are computed together,
            ``max_sequences`` of them in each run; the iterator then yields pairs of a prompt's number and a piece, in
            the order in which they come.
        max_tokens
            Most tokens to add to each; default until the model ends, or the context is full.
        temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed
            See :class:`~ggml_cffi.models.generation.sampling.Sampler`. Temperature 0 is greedy. Of several texts each
            has a seed of its own: ``seed`` plus its number.
        stop
            A text ends before any of these strings.
        reuse
            Take keys and values of the prompt's beginning from the cache where an earlier text has left them.
        max_sequences
            Most texts of a list that grow at once.

        Raises
        ------
        ValueError
            If a prompt does not fit the context, or a parameter is out of range. Raised by the call itself.
        ClosedError
            While iterating, if the model is closed.
        """
        stops = stop_strings(stop)

        def request(text: str | Chat, number: int) -> Request:
            ids = self._checked(self.tokenize(text if isinstance(text, str) else self.apply_chat_template(text)))
            own = seed if seed is None else seed + number
            sampler = Sampler(
                temperature,
                top_k,
                top_p,
                own,
                min_p=min_p,
                repeat_penalty=repeat_penalty,
                repeat_last_n=repeat_last_n,
            )
            return Request(ids, sampler, self._most(max_tokens), self.tokenizer.ends, reuse)

        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], Mapping)):
            return pieces(self._follow(request(prompt, 0)), self.tokenizer, stops)  # type: ignore[arg-type]
        if max_sequences < 1:
            raise ValueError(f"max_sequences must be at least 1, not {max_sequences}")
        requests = [request(one, i) for i, one in enumerate(prompt)]  # type: ignore[arg-type]
        return self._several(requests, max_sequences, stops)

    def generate_tokens(
        self,
        tokens: Iterable[int],
        max_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        repeat_last_n: int = 64,
        seed: int | None = None,
        stop_at_end: bool = True,
        reuse: bool = True,
    ) -> Iterator[int]:
        """As :meth:`generate`, from and to token ids. ``stop_at_end=False`` goes on after an end token."""
        sampler = Sampler(
            temperature, top_k, top_p, seed, min_p=min_p, repeat_penalty=repeat_penalty, repeat_last_n=repeat_last_n
        )
        ids, most = self._checked(tokens), self._most(max_tokens)
        ends = self.tokenizer.ends if stop_at_end else frozenset[int]()
        return self._follow(Request(ids, sampler, most, ends, reuse))

    def _follow(self, request: Request) -> Stream[int]:
        self.timings = timings = Timings()
        yield from follow(self._choose(request), request, timings)

    def _several(
        self, requests: list[Request], max_sequences: int, stops: tuple[str, ...]
    ) -> Iterator[tuple[int, str]]:
        texts = [Pieces(self.tokenizer, stops) for _ in requests]
        self.timings = timings = Timings()
        with closing(follow_everywhere(self._generators, requests, max_sequences, timings)) as tokens:
            for number, token in tokens:
                text = texts[number]
                piece = text.finish() if token is None else text.push(token)
                if piece:
                    yield number, piece
                if text.stopped:
                    requests[number].end()

    def _choose(self, request: Request | None = None) -> Generator:
        """The replica that has least to do; of several, the one whose cache has most of the request's beginning."""
        if len(self._generators) == 1:
            return self._generators[0]
        least = min(generator.load for generator in self._generators)
        idle = [generator for generator in self._generators if generator.load <= least] or self._generators
        return idle[0] if request is None else max(idle, key=lambda g: g.in_common(request.ids))

    def _most(self, max_tokens: int | None) -> int:
        if max_tokens is None:
            return self.n_ctx + 1
        if max_tokens < 0:
            raise ValueError(f"max_tokens must be at least 0, not {max_tokens}")
        return max_tokens

    # ------------------------------------------------------------------ the cache

    @property
    def cached(self) -> list[list[int]]:
        """Texts that are done and still in the cache, the latest last: their tokens.

        A later text that begins with the same tokens takes them over.
        """
        found = []
        for generator in self._generators:
            with generator.lock:
                generator.settle()
                found += [list(ids) for ids in generator.kept.values()]
        return found

    def save_cache(self, path: str | os.PathLike[str]) -> int:
        """Write what :attr:`cached` lists, with its keys and values, to a file; the number of tokens.

        The file is GGUF. Errors as writing any file.
        """
        return state.save(self._generators, path)

    def load_cache(self, path: str | os.PathLike[str]) -> int:
        """Put what :meth:`save_cache` wrote into the cache; the number of tokens.

        Raises
        ------
        FormatError
            If the file is no such file, or from another model or another type of cache.
        ValueError
            If the cache is too small for it.
        """
        return state.load(self._choose(), path)

    def clear_cache(self) -> None:
        """Forget what :attr:`cached` lists."""
        for generator in self._generators:
            with generator.lock:
                generator.settle()
                generator.drop_all()

    # ------------------------------------------------------------------ embeddings

    def embed(
        self, texts: Iterable[str | Iterable[int]], *, pooling: str | None = None, normalize: bool = True
    ) -> npt.NDArray[np.float32]:
        """A vector for each text: texts of like meaning have vectors of like direction.

        Models that were trained for it give the best ones, such as all-MiniLM; any other gives some. Texts longer than
        what the model was trained for, or than ``n_ctx``, are cut there, as sentence-transformers does.

        Parameters
        ----------
        texts
            Texts, or token ids of texts.
        pooling
            How a text's vector comes from its tokens': their ``mean``, the first one's (``cls``) or the ``last``
            one's. Default what the model was trained with.
        normalize
            Whether the vectors get length 1, so that their dot products are cosines.

        Returns
        -------
        numpy.ndarray
            float32, ``(n_sequences, n_embd)``, in the order of the texts.

        Raises
        ------
        ValueError
            If a text has no tokens or ids out of range, or there is no such pooling.
        FormatError
            If a text is given as such and the model has no vocabulary.
        ClosedError
            If the model is closed.

        Examples
        --------
        >>> a, b = model.embed(["How old are you?", "What is your age?"])  # doctest: +SKIP
        >>> float(a @ b)  # doctest: +SKIP
        """
        if isinstance(texts, str):
            raise TypeError("texts is a sequence: put the one text in a list")
        ids = [self.tokenize(text) if isinstance(text, str) else text for text in texts]
        if not self._embedders:
            raise ValueError("embed needs layers that are whole on a device: load the model with split='layer'")
        return embed_everywhere(self._embedders, ids, pooling=pooling, normalize=normalize)

    def _reserve(self, embedder: Embedder) -> None:
        sizes = embedder.reserve()
        for share in self._runners[-1].placement:
            share.compute_bytes = sizes[share.backend]

    # ------------------------------------------------------------------ the rest

    @property
    def placement(self) -> list[DevicePlacement]:
        """What each device holds: layers, bytes of weights, caches and intermediate results."""
        found = [share for runner in self._runners for share in runner.placement if not share.backend.device.is_cpu]
        # The CPU is every replica's.
        return found + [share for share in self._runners[0].placement if share.backend.device.is_cpu]

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler over all devices. It computes embeddings; and texts, unless the model is on GPUs whole.

        Raises
        ------
        ClosedError
            If the model is closed.
        ValueError
            If several devices compute every layer together: there is none then.
        """
        return self._runners[0].scheduler

    def assignment(self) -> list[tuple[Tensor, Backend]]:
        """What the last run computed for texts, in order, and on which backend each.

        Raises
        ------
        ClosedError
            If the model is closed.
        """
        return [entry for runner in self._runners for entry in runner.assignment()]

    def layer_backend(self, layer: int) -> Backend:
        """The backend where a layer's weights are; the first, where several have parts of it."""
        return next(share.backend for share in self.placement if layer in share.layers)

    def _checked(self, tokens: Iterable[int]) -> list[int]:
        ids = check_tokens(tokens, self.architecture.n_vocab)
        if not ids:
            raise ValueError("there are no tokens: the prompt is empty")
        if len(ids) > self.n_ctx:
            raise ValueError(f"{len(ids)} tokens do not fit the context of {self.n_ctx}")
        return ids

    def close(self) -> None:
        """Free everything. Closing twice is allowed."""
        for part in (*self._embedders, *self._generators, *self._backends, self._file):
            part.close()

    def __repr__(self) -> str:
        return f"<Model {os.path.basename(self._file.path)}{' closed' if self._runners[0].closed else ''}>"


def load(
    path: str | os.PathLike[str],
    devices: Sequence[Device | str] | None = None,
    split: str = "layer",
    n_ctx: int | None = None,
    *,
    n_batch: int = 512,
    kv_dtype: Type | str = Type.F16,
    n_threads: int | None = None,
    progress: Progress | None = None,
    balance: Balance = "memory",
    n_sequences: int = 1,
    expect: tuple[int, int] | None = None,
) -> Model:
    """Load a model from a GGUF file onto devices.

    Parameters
    ----------
    path
        The file.
    devices
        Devices or names; default every GPU. The CPU is added last: it holds the layers that the GPUs have
        no room for, and embeddings or a head that a GPU cannot use.
    split
        ``"layer"``: each device has some layers. ``"pipeline"``: so too, and GPUs that have them all compute the
        batches of a long prompt at the same time, each its layers of another batch. ``"data"``: each GPU has the whole
        model; several texts are dealt to them. ``"tensor"``: each GPU has a part of every layer, whole heads; they
        compute each token together. ``"auto"``: what is quickest, by timing the model the first time, for
        some ten seconds; :attr:`Model.plan` says why.
    n_ctx
        Most tokens of prompt and answer together; default what the model was trained for, at most 4096.
    n_batch
        Most tokens computed at once.
    kv_dtype
        Type of keys and values in the cache: F16, F32, BF16, or a quantized type for longer contexts.
    n_threads
        Threads of the CPU; default all that this process may use.
    progress
        Called with bytes done and bytes in all.
    balance
        How the layers are shared out. ``"memory"``: in proportion to free memory. ``"speed"``: to how fast the devices
        multiply, measured the first time, as far as memory allows; the CPU takes part if it is among ``devices``. Or
        numbers, one for each GPU, and one for the CPU if that is to have a part: they are kept to, or refused.
    n_sequences
        How many texts will usually grow at once, for ``split="auto"`` to know.
    expect
        How many tokens a prompt and its answer will usually have, ``(4096, 128)``, for ``split="auto"``: it takes what
        is quickest for them. Default what is never far from the best, whatever comes.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    FormatError
        If the file is malformed, or its architecture is unknown.
    ValueError
        If a device does not exist or a parameter is out of range.
    OutOfMemoryError
        If the devices have not enough memory. :func:`~ggml_cffi.models.plan` knows beforehand: nothing was allocated,
        and the message says what would fit.
    """
    check_options(split, n_batch)
    use, kind = Use(n_sequences, expect), as_type(kv_dtype)
    file = GGUFFile(path)
    backends: list[Backend] = []
    try:
        architecture = architecture_of(file)
        wish = Wish(context_of(architecture, n_ctx), n_batch, kind)
        backends = open_backends(devices, n_threads)
        planner = Planner(architecture, backends, wish, balance, devices, split, use)
        found = planner.arrange_or_raise()
        return Model(file, architecture, backends, wish, progress, found, planner.plan(found, propose=False))
    except BaseException:
        for backend in backends:
            backend.close()
        file.close()
        raise

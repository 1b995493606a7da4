"""A loaded model: text generation, logits, perplexity, embeddings, and its KV cache."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack, overload

import numpy as np
import numpy.typing as npt

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.numbers import as_integer
from ggml_cffi.core.progress import Progress
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.files.gguf.reader import GGUFFile
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.completion import CompletionMethods, GenerateOptions
from ggml_cffi.models.generation import kv_snapshot
from ggml_cffi.models.generation.batcher import Batcher
from ggml_cffi.models.generation.chat import Chat
from ggml_cffi.models.generation.deterministic import DeterministicBatcher
from ggml_cffi.models.generation.detokenize import check_stop, numbered_text_chunks, text_chunks
from ggml_cffi.models.generation.requests import (
    NumberedTokenStream,
    Request,
    TokenStream,
    choose_batcher,
    generate_on_replicas,
    generate_one,
)
from ggml_cffi.models.generation.sampling import Sampler, SamplingOptions, SamplingParams
from ggml_cffi.models.generation.stream import Stream
from ggml_cffi.models.generation.timings import Timings
from ggml_cffi.models.generation.tool_schema import Tool
from ggml_cffi.models.perplexity import Perplexity, measure_perplexity
from ggml_cffi.models.placement.plan import ModelPlan
from ggml_cffi.models.runners.base import MAX_SEQUENCES, Runner
from ggml_cffi.models.runners.embedding import Embedder, embed_on_replicas
from ggml_cffi.models.runners.weights import DevicePlacement
from ggml_cffi.models.text import TextMethods
from ggml_cffi.models.tokenizers.tokenizer import check_tokens
from ggml_cffi.scheduler.scheduler import Scheduler


class Model(TextMethods, CompletionMethods, Closing):
    """A model on its devices, opened by :func:`load`. It is a context manager.

    Calls from several threads share runs and the KV cache: their sequences are generated together.
    """

    def __init__(
        self,
        file: GGUFFile,
        architecture: Architecture,
        backends: Sequence[Backend],
        runners: Sequence[Runner],
        plan: ModelPlan,
        *,
        n_ctx: int,
        n_batch: int,
        deterministic: bool = False,
    ) -> None:
        super().__init__(file)
        self._backends, self._runners = backends, runners
        self.architecture = architecture
        """Sizes and graph of the model."""
        self.plan = plan
        """The plan that was made before loading: the contents of each device, with the reasons."""
        self.n_ctx = n_ctx
        """Largest number of tokens of prompt and answer together."""
        self.n_batch = min(n_batch, n_ctx)
        """Largest number of tokens in one run."""
        self.deterministic = deterministic
        """True if equal calls have equal results; see :func:`load`."""
        self.timings = Timings()
        """Counts and times of the call of :meth:`generate` that began last."""
        software = any("llvmpipe" in b.device.description for b in backends)
        # One for each replica. Not documented: :meth:`generate` and its relatives are the interface for users.
        new = DeterministicBatcher if deterministic else Batcher
        self.batchers = [new(runner, n_ctx, one_by_one=software) for runner in runners]
        self._embedders: list[Embedder] = []
        for runner in runners:
            scheduler = runner.scheduler
            if scheduler is not None:
                embedder = Embedder(architecture, runner.weights, scheduler, n_ctx, n_batch, alone=deterministic)
                self._embedders.append(embedder)
                if not architecture.causal:
                    self._reserve(runner, embedder)

    # ------------------------------------------------------------------ logits

    def forward(self, tokens: Iterable[int], *, last: bool = False) -> npt.NDArray[np.float32]:
        """Return the logits of ``tokens``, computed as a new sequence.

        Parameters
        ----------
        tokens
            1 to ``n_ctx`` token ids.
        last
            Return only the last token's logits.

        Returns
        -------
        numpy.ndarray
            float32, ``(n_tokens, n_vocab)``; ``(n_vocab,)`` if ``last``.

        Raises
        ------
        ValueError
            If there are no tokens, or more than fit the context, or ids out of range.
        ClosedError
            If the model is closed.
        GgmlError
            If the model is an encoder.
        """
        self.architecture.check_decoder()
        ids = self._check_prompt(tokens)
        logits: npt.NDArray[np.float32] = choose_batcher(self.batchers).logits(ids, 1 if last else len(ids))
        return logits[0] if last else logits

    def perplexity(
        self, text: str | Iterable[int], *, n_ctx: int = 512, progress: Progress | None = None
    ) -> Perplexity:
        """Return the perplexity of a text, measured as llama.cpp's ``perplexity`` does.

        The text is cut into windows of ``n_ctx`` tokens; tokens that fill no window are left out. In each window the
        tokens of the second half are scored, each from all tokens before it. Where the model has a beginning token, it
        takes the place of the window's first token.

        Parameters
        ----------
        text
            Text, or token ids.
        n_ctx
            Tokens of a window, at least 2, and at most the context of the model.
        progress
            Called with the tokens done and the tokens in all.

        Raises
        ------
        ValueError
            If ``n_ctx`` is below 2, the text is shorter than one window, or an id is out of range.
        """
        self.architecture.check_decoder()
        ids = self.tokenize(text) if isinstance(text, str) else check_tokens(text, self.architecture.n_vocab)
        has_vocabulary = self._file.metadata.get("tokenizer.ggml.model", "no_vocab") != "no_vocab"
        bos = self.tokenizer.bos if has_vocabulary and self.tokenizer.add_bos else None
        return measure_perplexity(choose_batcher(self.batchers), ids, min(n_ctx, self.n_ctx), bos, progress)

    # ------------------------------------------------------------------ generation

    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompt: str | Chat, max_tokens: int | None = None, **options: Unpack[GenerateOptions]
    ) -> Stream[str]: ...
    @overload
    def generate(
        self, prompt: Sequence[str] | Sequence[Chat], max_tokens: int | None = None, **options: Unpack[GenerateOptions]
    ) -> Stream[tuple[int, str]]: ...
    def generate(
        self,
        prompt: str | Chat | Sequence[str] | Sequence[Chat],
        max_tokens: int | None = None,
        *,
        sampling: SamplingParams | None = None,
        stop: str | Sequence[str] | None = None,
        reuse: bool = True,
        max_sequences: int = MAX_SEQUENCES,
        tools: Sequence[Tool] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        keep_special: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> Stream[str] | Stream[tuple[int, str]]:
        """Continue a text, or answer a chat; yield the text in chunks as it is generated.

        Any thread may end the generation by :meth:`Stream.cancel() <ggml_cffi.models.Stream.cancel>`. It also ends when
        the stream is deleted.

        Parameters
        ----------
        prompt
            Text, or messages for the model's chat template. The prompts of a list of either are continued together,
            at most ``max_sequences`` in each run. The iterator then yields pairs of a prompt's number and a chunk, in
            the order of generation.
        max_tokens
            Largest number of tokens to add to each prompt; default until the model ends the answer, or the context is
            full.
        sampling
            Parameters of the choice of tokens; default the most likely token (greedy). Each of several prompts has a
            seed of its own: the seed plus the prompt's number.
        stop
            Strings before which an answer ends.
        reuse
            True to take keys and values of the prompt's beginning from the KV cache if an earlier sequence left them.
        max_sequences
            Largest number of prompts of a list that are in generation at the same time.
        tools, documents, template_kwargs
            Tools that the model may call, documents that it may quote, and further arguments of
            :meth:`apply_chat_template`, such as ``{"enable_thinking": False}``. For chats only.
        keep_special
            True to keep the text of control tokens, for :class:`ChatParser`, which needs its markers. The token that
            ends the answer is left out.
        **options
            Fields of :class:`SamplingParams`, such as ``temperature=0.8``, in place of those of ``sampling``.

        Raises
        ------
        TypeError, ValueError
            If a prompt does not fit the context, or a parameter has a wrong type or is out of range. The call itself
            raises it.
        ClosedError
            If the model is closed, by the call or while iterating.
        """
        if not isinstance(prompt, Sequence):  # a dict is none
            raise TypeError(f"prompt must be a text, the messages of a chat, or a list of either, not {prompt!r:.80}")
        self._runners[0].check_open()
        self.architecture.check_decoder()
        stops, params = check_stop(stop), SamplingParams.from_options(sampling, **options)
        limit, each = self._check_max_tokens(max_tokens), as_integer("max_sequences", max_sequences, 1)
        timings = Timings()

        def request(text: str | Chat, number: int) -> Request:
            ids = self._check_prompt(
                self.tokenize(text, tools=tools, documents=documents, template_kwargs=template_kwargs)
            )
            sampler = Sampler.for_model(params, self.architecture.n_vocab, lambda: self.tokenizer, number)
            return Request(ids, sampler, limit, frozenset() if params.ignore_eos else self.tokenizer.end_tokens, reuse)

        if isinstance(prompt, str | bytes) or (prompt and isinstance(prompt[0], Mapping)):
            one = request(prompt, 0)  # type: ignore[arg-type]
            chunks = text_chunks(self._run(one, timings), one, self.tokenizer, stops, special=keep_special)
            return Stream(chunks, [one], timings)
        requests = [request(text, i) for i, text in enumerate(prompt)]  # type: ignore[arg-type]
        tokens = self._run_all(requests, 1 if self.deterministic else each, timings)
        return Stream(
            numbered_text_chunks(tokens, requests, self.tokenizer, stops, special=keep_special), requests, timings
        )

    def generate_tokens(
        self,
        tokens: Iterable[int],
        max_tokens: int | None = None,
        *,
        sampling: SamplingParams | None = None,
        stop_at_end: bool = True,
        reuse: bool = True,
        **options: Unpack[SamplingOptions],
    ) -> Stream[int]:
        """Continue token ids; yield the generated ids. Parameters and errors are those of :meth:`generate`.

        Parameters
        ----------
        tokens
            1 to ``n_ctx`` token ids.
        stop_at_end
            True to end at an end token, False to continue after it.
        """
        self._runners[0].check_open()
        self.architecture.check_decoder()
        params = SamplingParams.from_options(sampling, **options)
        sampler = Sampler.for_model(params, self.architecture.n_vocab, lambda: self.tokenizer)
        ids, limit = self._check_prompt(tokens), self._check_max_tokens(max_tokens)
        ends = self.tokenizer.end_tokens if stop_at_end and not params.ignore_eos else frozenset[int]()
        request, timings = Request(ids, sampler, limit, ends, reuse), Timings()
        return Stream(self._run(request, timings), [request], timings)

    def _run(self, request: Request, timings: Timings) -> TokenStream:
        self.timings = timings
        yield from generate_one(choose_batcher(self.batchers, request.ids), request, timings)

    def _run_all(self, requests: list[Request], max_sequences: int, timings: Timings) -> NumberedTokenStream:
        self.timings = timings
        yield from generate_on_replicas(self.batchers, requests, max_sequences, timings)

    def _check_prompt(self, tokens: Iterable[int]) -> list[int]:
        """Return a prompt as a list; raise ValueError if it is empty, too long, or has ids out of range."""
        ids = check_tokens(tokens, self.architecture.n_vocab)
        if not ids:
            raise ValueError("there are no tokens: the prompt is empty")
        if len(ids) > self.n_ctx:
            raise ValueError(f"{len(ids)} tokens do not fit the context of {self.n_ctx}")
        return ids

    def _check_max_tokens(self, max_tokens: int | None) -> int:
        """Return the limit of generated tokens, by default one that no context reaches."""
        return self.n_ctx + 1 if max_tokens is None else as_integer("max_tokens", max_tokens, 0)

    # ------------------------------------------------------------------ KV cache

    @property
    def cached(self) -> list[list[int]]:
        """Token ids of the finished sequences that the KV cache still holds, the latest last.

        A later prompt that begins with the same tokens reuses their keys and values.
        """
        found = []
        for batcher in self.batchers:
            with batcher.exclusive() as cache:
                found += [list(ids) for ids in cache.kept.values()]
        return found

    def save_cache(self, path: str | os.PathLike[str]) -> int:
        """Write the sequences of :attr:`cached`, with their keys and values, and return the number of their tokens.

        The file is GGUF.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        return kv_snapshot.save(self.batchers, path)

    def load_cache(self, path: str | os.PathLike[str]) -> int:
        """Read a file of :meth:`save_cache` into the KV cache, and return the number of its tokens.

        Raises
        ------
        FormatError
            If :meth:`save_cache` did not write the file, or the model or the type of its cache differs.
        ValueError
            If the cache has too few slots, or the model is deterministic: it uses no results of another process.
        """
        if self.deterministic:
            raise ValueError("a deterministic model uses no results of another process: load it without deterministic")
        return kv_snapshot.load(choose_batcher(self.batchers), path)

    def clear_cache(self) -> None:
        """Free the KV slots of the sequences of :attr:`cached`."""
        for batcher in self.batchers:
            with batcher.exclusive() as cache:
                cache.clear_kept()

    # ------------------------------------------------------------------ embeddings

    def embed(
        self, texts: Iterable[str | Iterable[int]], *, pooling: str | None = None, normalize: bool = True
    ) -> npt.NDArray[np.float32]:
        """Return a vector for each text. Texts of similar meaning have vectors of similar direction.

        Models that were trained for embeddings, such as all-MiniLM, give the best vectors. Other models work too. A
        text longer than the model's training length or than ``n_ctx`` is truncated, as in sentence-transformers.

        Parameters
        ----------
        texts
            Texts, or token ids of texts.
        pooling
            Way to get a text's vector from those of its tokens: their ``mean``, the first one (``cls``) or the ``last``
            one. Default the pooling of the model's training.
        normalize
            True to scale the vectors to length 1, so that their dot products are cosines.

        Returns
        -------
        numpy.ndarray
            float32, ``(n_sequences, n_embd)``, in the order of the texts.

        Raises
        ------
        ValueError
            If a text has no tokens or ids out of range, or there is no such pooling.
        FormatError
            If an item is text and the model has no vocabulary.
        ClosedError
            If the model is closed.

        Examples
        --------
        >>> a, b = model.embed(["How old are you?", "What is your age?"])  # doctest: +SKIP
        >>> float(a @ b)  # doctest: +SKIP
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence: put the one text in a list")
        ids = [self.tokenizer.encode(text) if isinstance(text, str) else text for text in texts]
        if not self._embedders:
            raise ValueError("embed needs layers that are whole on a device: load the model with split='layer'")
        return embed_on_replicas(self._embedders, ids, pooling=pooling, normalize=normalize)

    def _reserve(self, runner: Runner, embedder: Embedder) -> None:
        """Allocate the intermediates of an embedder, and count them in the placement."""
        sizes = embedder.reserve()
        for backend, placed in zip(runner.weights.backends, runner.placement, strict=True):
            placed.compute_bytes = sizes[backend]

    # ------------------------------------------------------------------ devices

    @property
    def placement(self) -> list[DevicePlacement]:
        """The contents of each device: layers, bytes of weights, KV cache and intermediate results."""
        found = [placed for runner in self._runners for placed in runner.placement if not placed.is_cpu]
        # Every replica shares the CPU.
        return found + [placed for placed in self._runners[0].placement if placed.is_cpu]

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler over all devices. It computes embeddings, and text unless all layers are on GPUs.

        Raises
        ------
        ClosedError
            If the model is closed.
        ValueError
            If the devices compute every layer together, without a scheduler.
        """
        scheduler = self._runners[0].scheduler
        if scheduler is None:
            raise ValueError("devices that share every layer have no scheduler: load the model with split='layer'")
        return scheduler

    def assignment(self) -> list[tuple[Tensor, Backend]]:
        """Return the nodes of the last run for generation or logits, in order, each with its backend.

        Raises
        ------
        ClosedError
            If the model is closed.
        """
        return [entry for runner in self._runners for entry in runner.assignment()]

    def layer_backend(self, layer: int) -> Backend:
        """Return the backend that holds a layer's weights, the first one if several hold parts of the layer."""
        return next(
            backend
            for runner in self._runners
            for backend, placed in zip(runner.weights.backends, runner.placement, strict=True)
            if layer in placed.layers
        )

    def close(self) -> None:
        """Free all memory, and close devices and file. Closing twice is allowed."""
        for part in (*self._embedders, *self.batchers, *self._backends, self._file):
            part.close()

    def __repr__(self) -> str:
        return f"<Model {os.path.basename(self._file.path)}{' closed' if self._runners[0].closed else ''}>"

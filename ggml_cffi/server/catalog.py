"""The models of a server by name: loaded when first asked for, unloaded when another one needs their memory."""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ggml_cffi import models
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.numbers import as_integer
from ggml_cffi.core.text import parse_size, size
from ggml_cffi.errors import OutOfMemoryError
from ggml_cffi.files.gguf.reader import GGUFFile
from ggml_cffi.models.architectures import architecture_of
from ggml_cffi.models.text import TextMethods
from ggml_cffi.server.engine import Engine
from ggml_cffi.server.errors import ApiError, LoadingError, QueueFullError, StoppingError
from ggml_cffi.server.local_engine import LocalEngine
from ggml_cffi.server.replicated import can_isolate, gpus_of_replicas, open_isolated


@dataclass(frozen=True)
class ModelSpec:
    """A model to serve."""

    path: str | os.PathLike[str]
    """A GGUF file, or an address that :func:`ggml_cffi.models.load` takes."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of :func:`ggml_cffi.models.load`. ``n_ctx`` is lowered to the context of the model's training
    where that is less, so that several models may share options."""


@dataclass(eq=False)
class Loaded(Closing):
    """A loaded model."""

    name: str
    text: TextMethods
    """The vocabulary and the chat templates."""
    engine: Engine
    file: GGUFFile | None = None
    """The file behind :attr:`text`, if the model itself is in another process."""

    @cached_property
    def longest_prompt(self) -> int:
        """Largest number of bytes of a text that fits into the context of a model that generates text."""
        tokenizer = self.text.tokenizer
        longest = max(len(tokenizer.token_bytes(token, special=True)) for token in range(len(tokenizer)))
        return longest * self.engine.facts.n_ctx

    def close(self) -> None:
        """Unload the model."""
        self.engine.close()
        if self.file is not None:
            self.file.close()


@dataclass(eq=False)
class _Entry:
    name: str
    spec: ModelSpec
    loaded: Loaded | None = None
    loading: asyncio.Task[None] | None = None
    uses: int = 0
    last_used: float = 0.0
    n_waiting: int = 0


class Catalog(Closing):
    """The models of a server. Close it at the end, after the server.

    Parameters
    ----------
    specs
        The models by name: a :class:`ModelSpec`, or the path of a file.
    memory
        Largest number of bytes that loaded models take on all devices together, as planned; a text such as ``"16G"`` is
        allowed. Default the memory of the devices: models are unloaded when another one does not fit.
    parallel
        Largest number of answers of one model that are in generation at once.
    max_waiting
        Largest number of requests for one model that wait for that.
    isolate
        True to load each model in a process of its own, and with ``split="data"`` each of its replicas; False to load
        all in this process. Default such processes only for the replicas of a model on several GPUs: in one process
        they would wait for one another's Python. They need Linux, and options of the model without ``progress``.

    Raises
    ------
    ValueError
        If there are no models, or a number is out of range.
    """

    def __init__(
        self,
        specs: Mapping[str, ModelSpec | str | os.PathLike[str]],
        *,
        memory: int | str | None = None,
        parallel: int = 16,
        max_waiting: int = 256,
        isolate: bool | None = None,
    ) -> None:
        if not specs:
            raise ValueError("there are no models: give at least one")
        self.parallel, self.max_waiting = as_integer("parallel", parallel, 1), as_integer("max_waiting", max_waiting, 1)
        self._memory = None if memory is None else parse_size(memory)
        self._isolate = isolate
        self._entries = {
            name: _Entry(name, spec if isinstance(spec, ModelSpec) else ModelSpec(spec)) for name, spec in specs.items()
        }
        self._turn = asyncio.Lock()  # held while a model is loaded
        self._idle, self._open = asyncio.Event(), asyncio.Event()
        self._open.set()  # cleared while models become idle, to be unloaded
        self._stopped = False
        self._ending = threading.Lock()  # a model is loaded before the end, or not at all

    @property
    def names(self) -> list[str]:
        """Names of the models."""
        return list(self._entries)

    @property
    def loaded(self) -> list[Loaded]:
        """The loaded models."""
        return [entry.loaded for entry in self._entries.values() if entry.loaded is not None]

    @property
    def is_open(self) -> bool:
        """False while a model waits for others to become idle, so that they make room for it."""
        return self._open.is_set()

    # ------------------------------------------------------------------ use

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Loaded]:
        """Load a model if necessary, and keep it loaded for the ``with`` block.

        Parameters
        ----------
        name
            Its name; None for the only one.

        Raises
        ------
        ApiError
            If there is no such model.
        QueueFullError
            If too many requests wait for it to be loaded.
        GgmlError, OSError
            If it cannot be loaded, or the server stops.
        """
        entry = self._find(name)
        loaded = await self._ready(entry)
        entry.uses += 1
        try:
            yield loaded
        finally:
            entry.uses -= 1
            entry.last_used = time.monotonic()
            if not entry.uses:
                self._idle.set()

    def _find(self, name: str | None) -> _Entry:
        if name is None and len(self._entries) == 1:
            return next(iter(self._entries.values()))
        if name is None:
            raise ApiError(400, f"'model' is missing: give one of {', '.join(self._entries)}", param="model")
        if name not in self._entries:
            known = ", ".join(self._entries)
            message = f"the model {name!r:.80} does not exist: there are {known}"
            raise ApiError(404, message, code="model_not_found", param="model")
        return self._entries[name]

    async def _ready(self, entry: _Entry) -> Loaded:
        """Return the model, loaded. There is no other task between the return and the caller's next statement."""
        with self._counted(entry):
            while True:
                await self._open.wait()
                if self._stopped:
                    raise StoppingError("the server is stopping")
                if entry.loaded is not None:
                    return entry.loaded
                if entry.loading is None:
                    entry.loading = asyncio.create_task(self._load(entry))
                # A client that leaves does not stop the loading: others wait for it, or will ask soon.
                await asyncio.shield(entry.loading)

    @contextmanager
    def _counted(self, entry: _Entry) -> Iterator[None]:
        if entry.n_waiting >= self.max_waiting:
            raise QueueFullError(f"{entry.n_waiting} requests are waiting for this model already: try again later")
        entry.n_waiting += 1
        try:
            yield
        finally:
            entry.n_waiting -= 1

    # ------------------------------------------------------------------ loading

    async def _load(self, entry: _Entry) -> None:
        try:
            async with self._turn:
                if self._memory is not None:
                    await self._make_room(await asyncio.to_thread(planned_bytes, entry.spec))
                while entry.loaded is None:
                    try:
                        await asyncio.to_thread(self._load_in_thread, entry)
                    except OutOfMemoryError:
                        if not await self._unload_one():
                            raise
        except (ValueError, TypeError) as error:  # they would be the client's
            message = f"the model {entry.name!r:.80} cannot be loaded: the log of the server has the reason"
            raise LoadingError(message) from error
        finally:
            entry.loading = None

    def _load_in_thread(self, entry: _Entry) -> None:
        """Load the model of an entry. The entry has it even if the task that called this was cancelled meanwhile."""
        loaded = self._open_model(entry)
        with self._ending:
            if not self._stopped:
                entry.loaded = loaded
                return
        loaded.close()
        raise StoppingError("the server is stopping")

    def _open_model(self, entry: _Entry) -> Loaded:
        path, options = resolve(entry.spec.path), dict(entry.spec.options)
        settings: dict[str, Any] = {"load": options, "parallel": self.parallel, "max_waiting": self.max_waiting}
        may_isolate = can_isolate(options) if self._isolate is None else self._isolate
        replicas = gpus_of_replicas(options) if may_isolate else []
        if not (self._isolate or replicas):
            engine = open_engine(path, **settings)
            return Loaded(entry.name, engine.model, engine)
        file = GGUFFile(path)
        try:
            isolated = open_isolated(open_engine, path, settings, replicas, max_waiting=self.max_waiting)
            return Loaded(entry.name, TextMethods(file), isolated, file)
        except BaseException:
            file.close()
            raise

    async def _make_room(self, n_bytes: int) -> None:
        """Unload models until ``n_bytes`` are free."""
        limit = self._memory or 0
        if n_bytes > limit:
            raise OutOfMemoryError(f"the model needs {size(n_bytes)}, and all models together may take {size(limit)}")
        while sum(loaded.engine.facts.n_bytes for loaded in self.loaded) + n_bytes > limit:
            await self._unload_one()

    async def _unload_one(self) -> bool:
        """Unload the idle model that was used least recently, and wait for one if all are busy.

        Requests wait meanwhile, so that a busy model becomes idle. Return False if no model is loaded.
        """
        try:
            while True:
                entries = [entry for entry in self._entries.values() if entry.loaded is not None]
                if not entries:
                    return False
                idle = [entry for entry in entries if not entry.uses]
                if idle:
                    entry = min(idle, key=lambda entry: entry.last_used)
                    loaded, entry.loaded = entry.loaded, None
                    if loaded is not None:
                        await asyncio.to_thread(loaded.close)
                    return True
                self._open.clear()
                self._idle.clear()
                await self._idle.wait()
        finally:
            self._open.set()

    # ------------------------------------------------------------------ the end

    def stop(self) -> None:
        """End all requests with an error, which ends their streams, and accept no others."""
        with self._ending:
            self._stopped = True
        for loaded in self.loaded:
            loaded.engine.stop()

    def close(self) -> None:
        """Stop, and unload all models."""
        self.stop()
        for entry in self._entries.values():
            loaded, entry.loaded = entry.loaded, None
            if loaded is not None:
                loaded.close()


def resolve(path: str | os.PathLike[str]) -> str:
    """Return the path of a file; a file of a hub is downloaded."""
    text = os.fspath(path)
    return os.fspath(models.fetch(text)) if text.startswith("hf://") else text


def default_name(path: str | os.PathLike[str]) -> str:
    """Return the name of a model that has no alias: its file's name without the ending."""
    return Path(os.fspath(path)).name.removesuffix(".gguf")


def fitting_options(path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a model, with a context that the model was trained for."""
    found = dict(options)
    with GGUFFile(path, header_only=True) as file:
        architecture = architecture_of(file)
        if found.get("n_ctx"):
            found["n_ctx"] = min(found["n_ctx"], architecture.n_ctx_train)
        if not architecture.causal:
            found.pop("kv_slots", None)
    return found


def open_engine(path: str, *, load: Mapping[str, Any], parallel: int, max_waiting: int) -> LocalEngine:
    """Load a model, and return its engine."""
    model = models.load(path, **fitting_options(path, load))
    try:
        return LocalEngine(model, parallel=parallel, max_waiting=max_waiting)
    except BaseException:
        model.close()
        raise


def planned_bytes(spec: ModelSpec) -> int:
    """Return the bytes that a model would take on all devices together."""
    path = resolve(spec.path)
    known = inspect.signature(models.plan).parameters
    options = {name: value for name, value in fitting_options(path, spec.options).items() if name in known}
    return sum(device.total for device in models.plan(path, **options).devices)

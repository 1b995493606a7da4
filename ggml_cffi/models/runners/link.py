"""Link: memory of a stage's device into which the device of the previous stage writes its results."""

from __future__ import annotations

from collections.abc import Sequence

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.buffer import Buffer
from ggml_cffi.core.dtypes import type_size
from ggml_cffi.core.handle import Closing
from ggml_cffi.core.locks import Locks
from ggml_cffi.core.unified import are_peers
from ggml_cffi.enums import Type


class Link(Closing):
    """Memory for the results of one stage, on the device of the next stage.

    Parameters
    ----------
    before, after
        Backends of the two stages.
    nbytes
        Bytes of a result, as from :func:`link_bytes`.
    n_slots
        Number of results for which there is memory.
    is_exact
        True if the previous stage writes as many rows as a batch has tokens, and no copies of the last one.

    Raises
    ------
    OutOfMemoryError
        If the device has too little memory.
    """

    def __init__(self, before: Backend, after: Backend, nbytes: int, n_slots: int, *, is_exact: bool = False) -> None:
        self._before, self._after = before, after
        self._event = c.ggml_backend_event_new(before.device.ptr)
        self.is_exact = is_exact
        """True if the next stage must not read more rows than a batch has tokens."""
        self.buffers: list[Buffer] = []
        """The memory of each slot."""
        try:
            for _ in range(n_slots):
                self.buffers.append(Buffer(after.buffer_type, nbytes))
        except BaseException:
            self.close()
            raise

    @property
    def has_event(self) -> bool:
        """True if the device of the next stage can wait for the one before it without the host."""
        return bool(self._event)

    def hand_over(self) -> None:
        """Let the device of the next stage wait for all work that was submitted to the one before it.

        C: ``ggml_backend_event_record``, ``ggml_backend_event_wait``.
        """
        with Locks((self._before.lock, self._after.lock)):
            c.ggml_backend_event_record(self._event, self._before.ptr)
            c.ggml_backend_event_wait(self._after.ptr, self._event)

    def close(self) -> None:
        """Free the memory and the event. Programs that use the memory keep it."""
        for buffer in self.buffers:
            buffer.close()
        self.buffers.clear()
        event, self._event = self._event, c.NULL
        if event:
            c.ggml_backend_event_free(event)


def link_bytes(n_batch: int, n_embd: int) -> int:
    """Return the bytes of the largest result that a stage hands over: F32 ``(n_batch, n_embd)``."""
    return n_batch * n_embd * type_size(Type.F32)


def is_linked(before: Sequence[Backend], after: Sequence[Backend]) -> bool:
    """Return whether the device of a stage writes its results where the next stage reads them.

    Parameters
    ----------
    before, after
        Backends of the two stages. Stages of several devices exchange results through memory of the host.
    """
    return len(before) == len(after) == 1 and are_peers([b.device for b in (*before, *after)])

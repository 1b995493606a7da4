"""Ownership of C objects.

A :class:`Handle` owns one C object. Closing the handle releases the object, which is freed once no other object depends
on it: each object keeps alive the objects that it was made from. So handles may be closed in any order. At interpreter
exit the remaining objects are freed, the newest first.
"""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, ClassVar, Self

from ggml_cffi.errors import ClosedError


class Owner:
    """Owner of one C object, which is freed when the owner is no longer referenced.

    ``cell`` is a one-element list with the pointer, None once freed.
    """

    __slots__ = ("__weakref__", "cell", "finalizer", "fork_safe", "kind")

    def __init__(
        self, kind: str, pointer: Any, free: Callable[[Any], None], parents: Iterable[Owner], fork_safe: bool
    ) -> None:
        self.kind = kind
        self.cell: list[Any] = [pointer]
        self.fork_safe = fork_safe
        # The finalizer's arguments hold the parents for as long as this object lives.
        self.finalizer = weakref.finalize(self, _free, self.cell, free, tuple(parents))
        _owners.add(self)


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()
_CLOSED: list[Any] = [None]


def _free(cell: list[Any], free: Callable[[Any], None], _parents: tuple[Owner, ...]) -> None:
    pointer, cell[0] = cell[0], None
    if pointer is not None:
        free(pointer)


def _after_fork_in_child() -> None:
    """Abandon objects with threads or GPU contexts, which do not survive a fork, without freeing them."""
    for owner in list(_owners):
        if not owner.fork_safe:
            owner.cell[0] = None
            owner.finalizer.detach()
            _forked_cells.append(owner.cell)


_forked_cells: list[list[Any]] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def live() -> Counter[str]:
    """Return the number of C objects not yet freed, by class name."""
    return Counter(owner.kind for owner in list(_owners) if owner.cell[0] is not None)


class Closing:
    """A context manager that calls :meth:`close` at the end."""

    __slots__ = ()

    def close(self) -> None:
        """Release all resources. Closing twice is allowed."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Handle(Closing):
    """Base of every object that is freed in C: ``close()``, ``with``, and :attr:`ptr` for the C layer below.

    Parameters
    ----------
    pointer
        The C object.
    free
        Function that frees it. It must not refer to the handle.
    parents
        Handles whose C objects this one uses.
    fork_safe
        True if the C object can be used in a forked child.
    """

    __slots__ = ("__weakref__", "_cell", "_owner")
    must_be_closed: ClassVar[bool] = True
    """True if a handle that was never closed warns when it is freed with its last reference."""

    def __init__(
        self, pointer: Any, free: Callable[[Any], None], parents: Iterable[Handle] = (), *, fork_safe: bool = True
    ) -> None:
        owners = [parent.owner for parent in parents]
        self._owner: Owner | None = Owner(type(self).__name__, pointer, free, owners, fork_safe)
        self._cell = self._owner.cell

    @property
    def ptr(self) -> Any:
        """The C pointer, for use with :mod:`ggml_cffi.c`. The handle frees it: do not free it yourself.

        Raises
        ------
        ClosedError
            If the object was closed, or a GPU or thread pool object is used after a fork.
        """
        pointer = self._cell[0]
        if pointer is None:
            raise self._closed_error()
        return pointer

    @property
    def owner(self) -> Owner:
        """The owner, which keeps the C object alive while it is referenced."""
        owner = self._owner  # once: another thread may close the handle
        if owner is None or self._cell[0] is None:
            raise self._closed_error()
        return owner

    @property
    def closed(self) -> bool:
        """True if the handle can no longer be used."""
        return self._cell[0] is None

    def _closed_error(self) -> ClosedError:
        name = type(self).__name__
        if any(self._cell is cell for cell in _forked_cells):
            return ClosedError(f"this {name} was opened before a fork; open a new one in a spawned process instead")
        return ClosedError(f"this {name} is closed")

    def close(self) -> None:
        """Release the C object, which is freed once nothing uses it. Closing twice is allowed."""
        # The pointer goes first, so that a finalizer that calls this again finds the handle closed.
        self._cell, owner = _CLOSED, getattr(self, "_owner", None)
        self._owner = None
        del owner

    def __enter__(self) -> Self:
        self.ptr  # noqa: B018 - raises when closed
        return self

    def __del__(self) -> None:
        owner = getattr(self, "_owner", None)
        if owner is not None and owner.cell[0] is not None and not sys.is_finalizing():
            if self.must_be_closed:
                warnings.warn(f"{type(self).__name__} was never closed", ResourceWarning, source=self, stacklevel=2)
            self.forgotten()

    def forgotten(self) -> None:
        """Close a handle that was never closed. The garbage collector calls this on any thread, with any locks held."""
        self.close()

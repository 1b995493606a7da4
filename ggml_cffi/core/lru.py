"""A least-recently-used cache of objects that must be closed, such as graphs, programs and buffers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar


class Closes(Protocol):
    """Anything with a ``close`` method."""

    def close(self) -> None:
        """Release the resources."""


K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Closes)


class LRU(Generic[K, V]):
    """The ``size`` last used values by key. The cache closes each value that it removes.

    Not thread-safe: callers hold a lock of their own.
    """

    __slots__ = ("_values", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: OrderedDict[K, V] = OrderedDict()

    def peek(self, key: K) -> V | None:
        """Return the value of ``key``, None without one, and leave the order as it is."""
        return self._values.get(key)

    def get(self, key: K, make: Callable[[], V]) -> V:
        """Return the value of ``key``. If it is missing, make it, and close the least recently used beyond ``size``."""
        found = self._values.get(key)
        if found is None:
            found = self._values[key] = make()
            if len(self._values) > self.size:
                _, oldest = self._values.popitem(last=False)
                oldest.close()
        else:
            self._values.move_to_end(key)
        return found

    @property
    def values(self) -> tuple[V, ...]:
        """The values, the last used last."""
        return tuple(self._values.values())

    def __len__(self) -> int:
        return len(self._values)

    def discard(self, condition: Callable[[V], bool]) -> None:
        """Close and remove the values that fulfil a condition."""
        for key in [key for key, value in self._values.items() if condition(value)]:
            self._values.pop(key).close()

    def clear(self) -> None:
        """Close all values."""
        values, self._values = self._values, OrderedDict()
        for value in values.values():
            value.close()

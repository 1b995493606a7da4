"""Reports of progress."""

from collections.abc import Callable

#: Called with the bytes (or tokens) done and their total.
Progress = Callable[[int, int], None]

"""Which token each row of the KV cache holds, and what each token may look at."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_FREE = -1
_YES, _NO = np.float16(0), np.float16(-np.inf)


class Cells:
    """The rows of one KV cache, shared by several sequences.

    Keys and values of one token take one row, wherever one is free; a mask says which rows belong to a sequence.

    Parameters
    ----------
    n_rows
        Rows of the cache.
    """

    def __init__(self, n_rows: int) -> None:
        self.sequence = np.full(n_rows, _FREE, np.int32)
        """For each row the sequence whose token it holds, -1 for none."""
        self.position = np.zeros(n_rows, np.int32)
        """For each row the position of its token in that sequence."""
        self.n_free = n_rows
        """Rows that hold nothing."""
        self.end = 0
        """The row after the last one in use."""
        self._seen: dict[int, npt.NDArray[np.float16]] = {}  # of texts that grow, kept up to date

    def __len__(self) -> int:
        return len(self.sequence)

    def take(self, sequence: int, start: int, n: int) -> npt.NDArray[np.int64]:
        """The first free rows, for the tokens of ``sequence`` at positions from ``start``: their numbers.

        The caller has seen to it that ``n`` are free.
        """
        rows = np.flatnonzero(self.sequence == _FREE)[:n]
        self.sequence[rows] = sequence
        self.position[rows] = np.arange(start, start + n)
        if sequence in self._seen:
            self._seen[sequence][rows] = _YES
        self.n_free -= n
        self.end = max(self.end, int(rows[-1]) + 1)
        return rows.astype(np.int64, copy=False)

    def take_one(self, sequence: int, position: int) -> int:
        """As :meth:`take` for one token, in a tenth of the time."""
        row = int(self.sequence.argmin())  # the least value is the mark of free rows
        self.sequence[row], self.position[row] = sequence, position
        if sequence in self._seen:
            self._seen[sequence][row] = _YES
        self.n_free -= 1
        if row >= self.end:
            self.end = row + 1
        return row

    def drop(self, sequence: int, start: int = 0) -> None:
        """Forget the tokens of ``sequence`` from position ``start`` on."""
        rows = np.flatnonzero((self.sequence == sequence) & (self.position >= start))
        self.sequence[rows] = _FREE
        self._seen.pop(sequence, None)
        self.n_free += len(rows)
        used = np.flatnonzero(self.sequence != _FREE)
        self.end = int(used[-1]) + 1 if used.size else 0

    def rows(self, sequence: int) -> npt.NDArray[np.int64]:
        """The rows of a sequence in the order of its positions."""
        rows = np.flatnonzero(self.sequence == sequence)
        return rows[np.argsort(self.position[rows])]

    def seen(self, sequence: int, n_kv: int) -> npt.NDArray[np.float16]:
        """As :meth:`mask` for the last token of a sequence, which sees all of it: ``(n_kv,)``, to be read only."""
        found = self._seen.get(sequence)
        if found is None:
            found = self._seen[sequence] = np.where(self.sequence == sequence, _YES, _NO)
        return found[:n_kv]

    def mask(
        self, sequences: npt.NDArray[np.int32], positions: npt.NDArray[np.int32], n_kv: int, window: int = 0
    ) -> npt.NDArray[np.float16]:
        """What tokens may look at in the first ``n_kv`` rows: 0 for yes, ``-inf`` for no.

        Parameters
        ----------
        sequences, positions
            Of the tokens, ``(n,)`` each. A token sees its own sequence up to itself.
        window
            If above 0, only the last so many tokens, itself included.

        Returns
        -------
        numpy.ndarray
            float16 ``(n, n_kv)``.
        """
        seen = self.position[:n_kv]
        hidden = (self.sequence[:n_kv] != sequences[:, None]) | (seen > positions[:, None])
        if window:
            hidden |= seen <= positions[:, None] - window
        found: npt.NDArray[np.uint16] = np.multiply(hidden, _NO.view(np.uint16))  # a third of np.where's time
        return found.view(np.float16)

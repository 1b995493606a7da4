"""KV slots: the token in each row of the KV cache, and the attention masks that result."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_FREE = -1
_VISIBLE, _HIDDEN = np.float16(0), np.float16(-np.inf)


class KVSlots:
    """The slots of one KV cache, which several sequences share.

    A slot is one row of every layer's cache: it holds the keys and values of one token. A token may go to any free
    slot; an attention mask hides the slots of other sequences.

    Parameters
    ----------
    n_slots
        Rows of the cache.
    """

    def __init__(self, n_slots: int) -> None:
        self.sequence = np.full(n_slots, _FREE, np.int32)
        """For each slot the id of the sequence whose token it holds, -1 for a free one."""
        self.position = np.zeros(n_slots, np.int32)
        """For each slot the position of its token in that sequence."""
        self.n_free = n_slots
        """Number of free slots."""
        self.end = 0
        """Number of the last slot in use, plus one."""
        self._visible: dict[int, npt.NDArray[np.float16]] = {}  # mask rows of sequences in decode, kept up to date

    def __len__(self) -> int:
        return len(self.sequence)

    def allocate(self, sequence: int, start: int, n: int) -> npt.NDArray[np.int64]:
        """Give the first ``n`` free slots to the tokens of ``sequence`` from position ``start`` on, and return them.

        At least ``n`` slots must be free.
        """
        slots = np.flatnonzero(self.sequence == _FREE)[:n]
        self.sequence[slots] = sequence
        self.position[slots] = np.arange(start, start + n)
        if sequence in self._visible:
            self._visible[sequence][slots] = _VISIBLE
        self.n_free -= n
        self.end = max(self.end, int(slots[-1]) + 1)
        return slots.astype(np.int64, copy=False)

    def allocate_one(self, sequence: int, position: int) -> int:
        """Give the first free slot to one token, and return it. It takes a tenth of the time of :meth:`allocate`."""
        slot = int(self.sequence.argmin())  # the least value marks free slots
        self.sequence[slot], self.position[slot] = sequence, position
        if sequence in self._visible:
            self._visible[sequence][slot] = _VISIBLE
        self.n_free -= 1
        if slot >= self.end:
            self.end = slot + 1
        return slot

    def release(self, sequence: int, start: int = 0) -> None:
        """Free the slots of ``sequence`` from position ``start`` on."""
        slots = np.flatnonzero((self.sequence == sequence) & (self.position >= start))
        self.sequence[slots] = _FREE
        self._visible.pop(sequence, None)
        self.n_free += len(slots)
        used = np.flatnonzero(self.sequence != _FREE)
        self.end = int(used[-1]) + 1 if used.size else 0

    def slots_of(self, sequence: int) -> npt.NDArray[np.int64]:
        """Return the slots of a sequence in the order of its positions."""
        slots = np.flatnonzero(self.sequence == sequence)
        return slots[np.argsort(self.position[slots])]

    def last_token_mask(self, sequence: int, n_kv: int) -> npt.NDArray[np.float16]:
        """Return the attention mask of a sequence's last token, which attends to the whole sequence.

        The array ``(n_kv,)`` is a view that later calls change. Do not write to it.
        """
        visible = self._visible.get(sequence)
        if visible is None:
            visible = self._visible[sequence] = np.where(self.sequence == sequence, _VISIBLE, _HIDDEN)
        return visible[:n_kv]

    def mask(
        self, sequences: npt.NDArray[np.int32], positions: npt.NDArray[np.int32], n_kv: int, window: int = 0
    ) -> npt.NDArray[np.float16]:
        """Return the attention mask of tokens over the first ``n_kv`` slots: 0 is visible, ``-inf`` is hidden.

        Parameters
        ----------
        sequences, positions
            Sequence and position of each token, ``(n,)`` each. A token attends to its own sequence, up to itself.
        window
            If above 0, the number of last tokens that are visible, the token itself included.

        Returns
        -------
        numpy.ndarray
            float16 ``(n, n_kv)``.
        """
        at = self.position[:n_kv]
        hidden = (self.sequence[:n_kv] != sequences[:, None]) | (at > positions[:, None])
        if window:
            hidden |= at <= positions[:, None] - window
        bits: npt.NDArray[np.uint16] = np.multiply(hidden, _HIDDEN.view(np.uint16))  # a third of np.where's time
        return bits.view(np.float16)

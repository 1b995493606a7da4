"""KV slots: allocation, release, attention masks."""

import numpy as np

from ggml_cffi.models.generation import KVSlots


def test_slots_are_allocated_released_and_masked():
    slots = KVSlots(8)
    assert slots.allocate(1, 0, 3).tolist() == [0, 1, 2]
    assert slots.allocate(2, 0, 2).tolist() == [3, 4]
    slots.release(1, 1)
    assert (slots.n_free, slots.end) == (5, 5)
    assert slots.allocate(2, 2, 3).tolist() == [1, 2, 5]
    assert slots.slots_of(2).tolist() == [3, 4, 1, 2, 5]
    mask = slots.mask(np.array([1, 2], np.int32), np.array([0, 3], np.int32), 6)
    assert mask.dtype == np.float16
    assert np.isfinite(mask).tolist() == [[True] + 5 * [False], [False, True, True, True, True, False]]
    near = slots.mask(np.array([2], np.int32), np.array([3], np.int32), 6, window=2)
    assert np.isfinite(near).tolist() == [[False, True, True, False, False, False]]
    slots.release(2)
    slots.release(1)
    assert (slots.n_free, slots.end) == (8, 0)


def test_one_slot_is_allocated_as_several_are():
    one, several = KVSlots(6), KVSlots(6)
    for slots in (one, several):
        slots.allocate(1, 0, 3)
        slots.allocate(2, 0, 1)
        slots.release(1, 1)
    assert [one.allocate_one(2, position) for position in (1, 2, 3)] == several.allocate(2, 1, 3).tolist() == [1, 2, 4]
    assert one.sequence.tolist() == several.sequence.tolist()
    assert one.position.tolist() == several.position.tolist()
    assert (one.n_free, one.end) == (several.n_free, several.end) == (1, 5)


def test_the_mask_of_the_last_token_shows_its_whole_sequence():
    slots = KVSlots(6)
    slots.allocate(1, 0, 2)
    slots.allocate_one(2, 0)
    assert np.isfinite(slots.last_token_mask(1, 4)).tolist() == [True, True, False, False]
    slots.allocate_one(1, 2)  # this updates the mask
    assert np.isfinite(slots.last_token_mask(1, 4)).tolist() == [True, True, False, True]
    want = slots.mask(np.array([1], np.int32), np.array([2], np.int32), 6)
    assert np.array_equal(slots.last_token_mask(1, 6), want[0])


def test_a_mask_shows_each_token_its_own_sequence_up_to_itself(rng):
    slots = KVSlots(64)
    slots.sequence[:] = rng.integers(-1, 4, 64)
    slots.sequence[20:30] = 4  # neighbors
    for sequence in range(5):
        own = np.flatnonzero(slots.sequence == sequence)
        slots.position[own] = rng.permutation(own.size)
    sequences = np.array([4] * 9 + [0, 3, 1, 1, 2, 2, 2, 9, 0], np.int32)
    positions = np.array([*range(9), 5, 4, 6, 7, 1, 2, 3, 0, 6], np.int32)
    for window, start, n_kv in ((0, 0, 64), (3, 0, 64), (0, 16, 32), (3, 16, 32)):
        want = [
            [owner == sequence and at <= position and (not window or at > position - window) for owner, at in places]
            for sequence, position in zip(sequences, positions, strict=True)
            for places in [[*zip(slots.sequence, slots.position, strict=True)][start : start + n_kv]]
        ]
        for rows in (slice(None), slice(9, 12)):  # several tokens of some sequences, and one of each
            mask = slots.mask(sequences[rows], positions[rows], n_kv, window, start)
            assert np.isfinite(mask).tolist() == want[rows]
            assert set(mask.flat) <= {0, -np.inf}

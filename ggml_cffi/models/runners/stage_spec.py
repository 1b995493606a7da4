"""The layers and the devices of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

_MOST_TURNS = 4  # each takes a token through all devices: more of them make decoding slower
_LAYERS_PER_TURN = 4


@dataclass(frozen=True)
class StageSpec:
    """Neighbouring layers, and the devices that compute them."""

    layers: range
    devices: tuple[int, ...]
    """Numbers of backends. If there are several, each has a shard of every layer."""


def stages_of(layer_devices: Sequence[int]) -> tuple[StageSpec, ...]:
    """Return stages of one device each, from the device of each layer."""
    found, start = [], 0
    for device, layers in groupby(layer_devices):
        n = len(list(layers))
        found.append(StageSpec(range(start, start + n), (device,)))
        start += n
    return tuple(found)


def interleave(layer_devices: Sequence[int]) -> list[int]:
    """Return the device of each layer so that each device has layers at several places, in turns with the others.

    Each device keeps its number of layers. There are as many turns as devices, up to 4, as long as each device has at
    least 4 layers in a turn. With batches in flight, a device waits at the beginning and at the end of a prompt for as
    long as the others take for the layers of one turn.

    >>> interleave([0] * 8 + [1] * 9)
    [0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1]
    """
    counts = {device: len(list(layers)) for device, layers in groupby(layer_devices)}
    if sum(counts.values()) != len(layer_devices):
        return [*layer_devices]  # they take turns already
    turns = min(len(counts), _MOST_TURNS, min(counts.values()) // _LAYERS_PER_TURN) or 1
    return [
        device
        for turn in range(turns)
        for device, n in counts.items()
        for _ in range(n * turn // turns, n * (turn + 1) // turns)
    ]


def even_stages(n_layers: int, devices: Sequence[Sequence[int]]) -> tuple[StageSpec, ...]:
    """Return a stage of about equally many layers for each element of ``devices``.

    >>> even_stages(32, [(0, 1), (2, 3)])
    (StageSpec(layers=range(0, 16), devices=(0, 1)), StageSpec(layers=range(16, 32), devices=(2, 3)))
    """
    n = len(devices)
    return tuple(
        StageSpec(range(n_layers * i // n, n_layers * (i + 1) // n), tuple(own)) for i, own in enumerate(devices)
    )


def n_slots_for(stages: Sequence[StageSpec]) -> int:
    """Return the number of batches for which each stage has memory for inputs and results: slots.

    A stage reads one while the previous stage writes another. Where devices have several stages, more batches pass one
    stage before the device computes its next one.
    """
    return 4 if len(stages) > len({stage.devices for stage in stages}) else 2

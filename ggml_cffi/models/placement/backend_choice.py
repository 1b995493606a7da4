"""Choice of the backend for GPUs that several backends show, such as CUDA and Vulkan, for the split ``"auto"``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from ggml_cffi.core.backend import Backend, open_backends
from ggml_cffi.core.device import DeviceLike, other_backends
from ggml_cffi.errors import GgmlError
from ggml_cffi.models.placement.auto import Candidate, choose_fastest
from ggml_cffi.models.placement.placement import Placement
from ggml_cffi.models.placement.planner import Planner


def place_on_devices(
    make_planner: Callable[[Sequence[Backend]], Planner],
    opened: Sequence[Backend],
    chosen: Sequence[DeviceLike] | None = None,
    n_threads: int | None = None,
    *,
    compare: bool,
) -> tuple[Planner, Placement]:
    """Return a planner with its placement: for open devices, or for the same GPUs by another backend if that is faster.

    Parameters
    ----------
    make_planner
        Function that returns a planner for some backends.
    opened
        Backends of the devices. They are closed if this function raises an exception, or chooses others.
    chosen
        The devices as the caller gave them; None for all GPUs.
    n_threads
        Threads of the CPU; default all that this process may use.
    compare
        True to compare the backends that show the GPUs, if ``chosen`` does not name one. Those of the planner are open
        afterwards, and no others.

    Raises
    ------
    ValueError
        As :class:`Planner`.
    """
    tried = [opened]
    try:
        planners = [make_planner(opened)]
        for devices in other_backends(chosen) if compare else ():
            with suppress(GgmlError):  # a driver that does not work is no choice
                tried.append(open_backends(devices, n_threads))
                planners.append(make_planner(tried[-1]))
        best, placement = place_on_best(planners)
    except BaseException:
        _close(tried)
        raise
    _close([backends for backends in tried if backends is not best.backends])
    return best, placement


def _close(opened: Sequence[Sequence[Backend]]) -> None:
    for backends in opened:
        for backend in backends:
            backend.close()


def place_on_best(planners: Sequence[Planner]) -> tuple[Planner, Placement]:
    """Return the planner whose placement for the split ``"auto"`` is the fastest, with the placement.

    Placements with layers on the CPU are not compared, since the CPU then decides the speed.

    Parameters
    ----------
    planners
        Planners of one model, one for each backend of the same GPUs, the default first.
    """
    if len(planners) == 1:
        return planners[0], planners[0].place()
    found = [
        Candidate(_name(planner, name), placement, planner.backends)
        for planner in planners
        for name, placement in planner.candidates().items()
        if placement.fits and placement.stages
    ]
    possible = [planner for planner in planners if any(each.backends is planner.backends for each in found)]
    if len(possible) < 2:
        planner = (possible or planners)[0]
        return planner, planner.place()
    best = choose_fastest(planners[0].architecture, planners[0].options, planners[0].workload, found)
    return next(planner for planner in planners if planner.backends is best.backends), best.placement


def _name(planner: Planner, split: str) -> str:
    """Return the name of a split on the backend of a planner. On one GPU there is nothing to split."""
    first, *others = planner.backends
    return f"{first.device.backend_name} {'one' if len(others) == 1 else split}"

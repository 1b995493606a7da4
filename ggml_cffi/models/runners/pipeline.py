"""Pipeline runner: stages of layers, each on one or several devices, without ggml's scheduler.

A stage of several devices is tensor parallelism: each device has a shard of every layer. One stage of all devices is
tensor parallelism alone, stages of one device each are pipeline parallelism alone, and stages of several devices
combine the two. A device may have several stages, with those of other devices in between: a batch then comes to each
device sooner, and devices wait less at the beginning and at the end of a prompt.

Each device computes graphs of its own, which read inputs from host memory and write results to host memory. A token is
one submission for a stage of one device, and nothing is copied from device to device. Where devices write the memory of
their peers, the results of a stage go to the device of the next stage instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial
from itertools import pairwise, zip_longest
from threading import RLock
from typing import TYPE_CHECKING

from ggml_cffi.core.backend import Backend
from ggml_cffi.core.op_sets import VIEWS
from ggml_cffi.core.progress import Progress
from ggml_cffi.core.tensor import Tensor
from ggml_cffi.enums import Type
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.runners.base import Batch, Logits, Runner, kv_slots_for
from ggml_cffi.models.runners.link import Link, is_linked, link_bytes
from ggml_cffi.models.runners.stage import Stage, StageGraph
from ggml_cffi.models.runners.stage_queue import Hidden, StageQueue, queues_of
from ggml_cffi.models.runners.stage_spec import StageSpec, n_slots_for
from ggml_cffi.models.runners.weights import Weights
from ggml_cffi.parallel.group import Group
from ggml_cffi.parallel.rank import DIRECT
from ggml_cffi.parallel.tensor_parallel import check_devices
from ggml_cffi.scheduler.scheduler import Scheduler

if TYPE_CHECKING:
    from concurrent.futures import Future

_QUEUED = 16  # batches of a prompt that one call computes: few enough that a caller can stop soon


def can_pipeline(weights: Weights) -> bool:
    """Return whether stages of GPUs can compute a model whose layers each have one device.

    They cannot if the CPU or a remote device takes part, or for an encoder.
    """
    used = {stage.devices[0] for stage in weights.stages}
    return (
        weights.architecture.causal
        and _ends_fit(weights)
        and not any(weights.backends[i].device.is_cpu or weights.backends[i].device.is_remote for i in used)
    )


def _ends_fit(weights: Weights) -> bool:
    """Return whether the first stage has the embeddings, and the last one the output head."""
    first, last = weights.stages[0], weights.stages[-1]
    return weights.embedding_devices == first.devices and weights.output_devices == last.devices


def _finish(stages: Iterable[Stage], *, if_free: bool = False) -> None:
    """Wait for the devices of some stages."""
    for stage in {stage.group: stage for stage in stages}.values():
        stage.finish(if_free=if_free)


class PipelineRunner(Runner):
    """A model as pipeline stages, each on one or several devices.

    Several batches of a prompt are in flight: while one stage computes a batch, the previous one computes the next.

    Parameters
    ----------
    architecture
        The model.
    backends
        Backends of the devices, the preferred first. The CPU may be the last, and then computes embeddings only.
    n_ctx
        Tokens of the context; the KV cache has as many slots, rounded up.
    n_batch
        Largest number of tokens in one run.
    kv_dtype
        Type of keys and values in the cache.
    progress
        Called with bytes done and bytes in all while weights are loaded.
    stages
        Layers and devices of each stage. Default one stage of all GPUs, which is tensor parallelism. For 2 stages of 2
        devices pass ``even_stages(architecture.n_layers, [(0, 1), (2, 3)])``, for 2 stages on each of 2 devices
        ``even_stages(architecture.n_layers, [(0,), (1,), (0,), (1,)])``.
    whole_attention
        True if each device of a stage computes all heads, and only the feed-forward part is sharded: half as many
        all-reduces, more memory.
    in_flight
        False to pass only one batch at a time through the stages.
    half_above, threads
        As for :class:`~ggml_cffi.parallel.TensorParallel`.

    Raises
    ------
    ValueError
        If a device cannot take part, or the model is too small for this number of devices.
    OutOfMemoryError
        If a device has too little memory.
    """

    def __init__(
        self,
        architecture: Architecture,
        backends: Sequence[Backend],
        n_ctx: int = 4096,
        n_batch: int = 512,
        kv_dtype: Type = Type.F16,
        progress: Progress | None = None,
        *,
        stages: Sequence[StageSpec] | None = None,
        whole_attention: bool = False,
        in_flight: bool = True,
        half_above: int | None = None,
        threads: bool | None = None,
    ) -> None:
        if stages is None:
            gpus = [i for i, b in enumerate(backends) if not b.device.is_cpu] or [0]
            stages = [StageSpec(range(architecture.n_layers), tuple(gpus))]
        check_stages(stages, architecture.n_layers, backends)
        self.architecture, self.n_batch, self.n_slots = architecture, n_batch, kv_slots_for(n_ctx)
        self._closed, self._in_flight, self.abort_lock = False, False, RLock()
        self._scheduler: Scheduler | None = None
        self.stages: list[Stage] = []
        """The stages in order."""
        self._groups: dict[tuple[int, ...], Group] = {}  # by the numbers of its backends
        self._n_slots = n_slots_for(stages)
        self._queues: list[StageQueue] = []
        self.weights = Weights(
            architecture, backends, self.n_slots, kv_dtype, stages, progress, whole_attention=whole_attention
        )
        try:
            if not _ends_fit(self.weights):
                raise ValueError(
                    "the device of the first or the last stage cannot compute with the embeddings or the output head "
                    "in their type: use split='layer'"
                )
            for devices in dict.fromkeys(spec.devices for spec in stages):
                self._groups[devices] = Group([backends[i] for i in devices], half_above=half_above, threads=threads)
            for spec, after in zip_longest(stages, stages[1:]):
                self._add_stage(spec, after)
            self._count_bytes()
            if self._can_queue(in_flight=in_flight):
                self.n_in_flight, self.n_queued_batches = len(self._groups), _QUEUED
                self._queues = queues_of(self.stages)
            if self.weights.is_whole and backends[-1].device.is_cpu:
                self._scheduler = Scheduler(backends)
        except BaseException:
            self.close()
            raise

    def _add_stage(self, spec: StageSpec, after: StageSpec | None) -> None:
        """Make a stage, with memory for the largest batch, and a link to the stage after it."""
        n_embd, group = self.architecture.n_embd, self._groups[spec.devices]
        own, following = group.backends, [self.weights.backends[i] for i in ([] if after is None else after.devices)]
        number = sum(stage.group is group for stage in self.stages)
        receives = self.stages[-1].sends if self.stages else None
        graph = StageGraph.of(self.weights, spec)
        sends = None
        if is_linked(own, following):
            is_exact = not graph.is_resizable or (receives is not None and receives.is_exact)
            sends = Link(own[0], following[0], link_bytes(self.n_batch, n_embd), self._n_slots, is_exact=is_exact)
        self.stages.append(Stage(graph, group, receives, sends, number=number, n_slots=self._n_slots))
        self.stages[-1].reserve(self.n_batch, self.n_slots)

    def _can_queue(self, *, in_flight: bool) -> bool:
        """Return whether the next batches are queued while devices compute one.

        With one stage of several devices, the host works between the steps of a batch: it has no time for the next.
        """
        if len(self.stages) > 1:
            return in_flight
        backends = self.stages[0].group.backends
        return len(backends) == 1 and not backends[0].device.is_cpu

    def _count_bytes(self) -> None:
        """Note the bytes of intermediate tensors and inputs on each device."""
        for devices, group in self._groups.items():
            links = [stage.receives for stage in self.stages if stage.group is group and stage.receives is not None]
            received = sum(buffer.size for link in links for buffer in link.buffers)
            for i, size in zip(devices, group.device_bytes(), strict=True):
                self.placement[i].compute_bytes = size + received

    @property
    def scheduler(self) -> Scheduler | None:
        """A scheduler over all devices, which computes embeddings; None if layers are sharded, or without the CPU."""
        self.check_open()
        return self._scheduler

    @property
    def closed(self) -> bool:
        """True once the model is closed."""
        return self._closed

    def assignment(self) -> list[tuple[Tensor, Backend]]:
        self.check_open()
        return [(t, backend) for s in self.stages for t, backend in s.assignment() if t.op not in VIEWS]

    def run(self, batch: Batch, meanwhile: Callable[[], object] | None = None) -> Logits:
        self.check_open()
        self._finish_queues()  # if a caller of run_all is not done, or was interrupted twice
        if len(self.stages) == 1:
            return self.stages[0].run(batch, meanwhile=meanwhile)
        programs = [stage.program(batch).program for stage in self.stages]  # now: building a graph takes locks
        if all(stage.sends is not None and stage.sends.has_event for stage in self.stages[:-1]):
            return self._run_linked(batch, meanwhile)
        if meanwhile is not None:  # now: between two stages, a device would wait for the host
            meanwhile()
        small = len(batch.tokens) * self.architecture.n_embd * 4 <= DIRECT
        if small and all(program.polled_output is not None for program in programs[:-1]):
            return self._run_polling(batch)
        return self._run_waiting(batch)

    def _run_linked(self, batch: Batch, meanwhile: Callable[[], object] | None) -> Logits:
        """Submit all stages at once: each device waits for the one before it without the host."""
        try:
            for stage in self.stages:
                result = stage.submit(batch)
                if stage.sends is not None:
                    stage.sends.hand_over()
            if meanwhile is not None:
                meanwhile()
        finally:
            _finish(self.stages)
        return result()

    def _run_waiting(self, batch: Batch) -> Logits:
        """Run each stage when the devices of the previous stage are done."""
        x: Hidden | None = None
        for stage, after in zip_longest(self.stages, self.stages[1:]):
            # While a stage computes, this thread writes the inputs of the next one.
            x = stage.run(batch, x, meanwhile=None if after is None else partial(after.prepare, batch))
        assert x is not None
        return x

    def _run_polling(self, batch: Batch) -> Logits:
        """Run each stage once the result of the previous stage is in host memory, and wait for the device later."""
        x: Hidden | None = None
        try:
            for stage, after in pairwise(self.stages):
                # This thread then holds the next device, and must release it before it waits for this stage's device.
                x = stage.run_and_poll(
                    batch, x, partial(after.prepare_and_record, batch), partial(_finish, (after, stage))
                )
            last = self.stages[-1]
            others = [stage for stage in self.stages if stage.group is not last.group]
            return last.run(batch, x, meanwhile=partial(_finish, others, if_free=True))
        finally:
            _finish(reversed(self.stages))  # the last first: this thread may hold its device, for recorded work

    def run_all(self, batches: Iterable[Batch]) -> Generator[Logits, None, None]:
        if not self._queues:
            yield from map(self.run, batches)
            return
        self.check_open()
        self._finish_queues()
        in_flight: deque[tuple[Future[Hidden], int]] = deque()
        try:
            for i, batch in enumerate(batches):
                in_flight.append((self._start(batch, i), len(batch.output_ids)))
                if len(in_flight) > len(self.stages):
                    future, n_out = in_flight.popleft()
                    yield future.result()[:n_out]
            while in_flight:
                future, n_out = in_flight.popleft()
                yield future.result()[:n_out]
        finally:
            self._finish_queues()  # the caller may use the KV slots for others next

    def _finish_queues(self) -> None:
        """Wait for all batches in flight, if there are any."""
        if self._in_flight:
            for queue in self._queues:
                queue.finish()
            self._in_flight = False

    def _start(self, batch: Batch, i: int) -> Future[Hidden]:
        """Queue batch ``i`` at every stage. A stage computes the batch once the previous stage has."""
        self.check_open()
        self._in_flight = True  # from now on, until all queues are finished
        slot = i % self._n_slots
        x: Future[Hidden] | None = None
        before: StageQueue | None = None
        for queue in self._queues:
            written, result = queue.start(batch, i, x, copied=queue is self._queues[-1])
            if before is not None:
                before.read[slot] = x if before.stage.sends else written
                before.computed_after[slot] = result if before.stage.sends else None
            before, x = queue, result
        assert before is not None
        assert x is not None
        before.read[slot] = x
        return x

    def close(self) -> None:
        """Free weights, caches, graphs and scheduler. The backends stay open."""
        self._closed = True
        for queue in self._queues:
            queue.close()
        self._queues = []
        for part in (*self.stages, *self._groups.values()):
            part.close()
        scheduler, self._scheduler = self._scheduler, None
        if scheduler is not None:
            scheduler.close()
        self.weights.close()


def check_stages(stages: Sequence[StageSpec], n_layers: int, backends: Sequence[Backend]) -> None:
    """Raise ValueError unless the stages have every layer once, in order, on devices that can compute together."""
    layers = [layer for stage in stages for layer in stage.layers]
    if layers != [*range(n_layers)] or not all(len(stage.layers) for stage in stages):
        raise ValueError(f"stages have layers {layers}: each of the {n_layers} layers must be there once, in order")
    used = [device for stage in stages for device in stage.devices]
    if not all(0 <= device < len(backends) for device in used):
        raise ValueError(f"stages have devices {used}: they are numbers of {len(backends)} backends, from 0")
    groups = {stage.devices for stage in stages}
    if len(set(used)) < sum(map(len, groups)):
        raise ValueError(
            f"stages have devices {sorted(groups)}: those of two stages must be the same, in the same order, or all "
            "different"
        )
    for group in groups:
        check_devices([backends[device].device for device in group])

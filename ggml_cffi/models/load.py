"""Loading of a model: opening the file and the devices, placing the layers, and opening runners for them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence

from ggml_cffi.core.backend import Backend, open_backends
from ggml_cffi.core.device import DevicesLike, device_list
from ggml_cffi.core.dtypes import as_type
from ggml_cffi.core.progress import Progress
from ggml_cffi.enums import Type
from ggml_cffi.files.gguf.reader import GGUFFile
from ggml_cffi.models.architectures.base import Architecture
from ggml_cffi.models.architectures.registry import architecture_of, context_of
from ggml_cffi.models.model import Model
from ggml_cffi.models.placement.backend_choice import place_on_devices
from ggml_cffi.models.placement.hypothetical import refuse_hypothetical
from ggml_cffi.models.placement.options import (
    Balance,
    LoadOptions,
    SplitMode,
    Workload,
    check_kv_slots,
    check_options,
    parse_reserve,
)
from ggml_cffi.models.placement.placement import Placement
from ggml_cffi.models.placement.plan import check_fits, report
from ggml_cffi.models.placement.planner import Planner
from ggml_cffi.models.runners.base import Runner
from ggml_cffi.models.runners.pipeline import PipelineRunner
from ggml_cffi.models.runners.scheduled import ScheduledRunner


def load(
    path: str | os.PathLike[str],
    devices: DevicesLike | None = None,
    split: SplitMode = "layer",
    n_ctx: int | None = None,
    *,
    n_batch: int = 512,
    kv_dtype: Type | str = Type.F16,
    n_threads: int | None = None,
    progress: Progress | None = None,
    balance: Balance = "memory",
    n_sequences: int = 1,
    expected_tokens: tuple[int, int] | None = None,
    reserve: int | str | None = None,
    deterministic: bool = False,
    kv_slots: int | None = None,
    repack: bool | None = None,
) -> Model:
    """Load a model from a GGUF file onto devices.

    Parameters
    ----------
    path
        Path of the file, or an address of the Hugging Face hub such as ``hf://org/repo/file.gguf`` or
        ``hf://org/repo:Q4_K_M``, which :func:`fetch` downloads on first use.
    devices
        Devices or names, or one of them; default every GPU. The CPU is added last: it holds the layers that the GPUs
        have no memory for, and embeddings or an output head whose type a GPU does not support.
    split
        ``"layer"``: each device has some layers. ``"pipeline"``: the same, and GPUs that have all layers, each at
        several places, compute several batches of a long prompt at the same time. ``"data"``: each GPU has the whole
        model, and sequences are distributed over the GPUs. ``"tensor"``: each GPU has a shard of every layer, in whole
        heads; the GPUs compute each token together. ``"auto"``: the fastest of these, and of the backends that show the
        GPUs, such as CUDA and Vulkan, unless ``devices`` has names of a backend's devices. The first load times the
        model for some ten seconds; :attr:`Model.plan` has the reason for the choice.
    n_ctx
        Largest number of tokens of prompt and answer; default the context of the model's training, at most 4096.
    n_batch
        Largest number of tokens in one run.
    kv_dtype
        Type of keys and values in the cache: F16, F32, BF16, or a quantized type for longer contexts.
    n_threads
        Threads of the CPU; default all that this process may use.
    progress
        Called with bytes done and bytes in all.
    balance
        Proportions of the layers. ``"memory"``: by free memory. ``"speed"``: by the speed of matrix products, as far as
        memory allows. The first load measures it. The CPU takes part if it is among ``devices``. Or numbers: one for
        each GPU, and one more if the CPU takes part. Loading fails if these parts do not fit.
    n_sequences
        Number of sequences that are usually generated at once, for ``split="auto"``.
    expected_tokens
        Usual tokens of a prompt and of its answer, such as ``(4096, 128)``, for ``split="auto"``, which chooses the
        fastest split for these numbers. By default it chooses the split that is never far from the fastest.
    reserve
        Free memory of each GPU that the model does not use, in bytes or as a text such as ``"1G"``. Default 512 MiB,
        and a sixteenth of the free memory of a GPU with less than 8 GiB: for the driver, compiled kernels, and other
        programs.
    deterministic
        True if equal calls must have equal results, bit for bit. They then do not depend on the contents of the KV
        cache, on other texts or threads, or on the load of the processors. This holds for the same file, devices,
        placement, ``n_ctx``, ``n_batch``, ``kv_dtype`` and ``n_threads``, with the same drivers. Each device generates
        one text at a time, and of earlier texts it reuses only whole batches of a prompt.
    kv_slots
        Tokens for which the KV cache has room, of all sequences together; default ``n_ctx``. More of them keep several
        long sequences in the cache at once.
    repack
        True to arrange weights of the CPU for its fastest kernels, where it has them: for Q4_0 and IQ4_NL, and with AMX
        also for Q4_1, Q8_0, Q4_K, Q5_K and IQ4_XS. Loading then reads and copies these weights, which otherwise
        are pages of the file that the system reads when they are needed, shares among processes, and can drop. Default:
        if there are no GPUs, and all weights take at most half of the free memory.

    Raises
    ------
    FileNotFoundError
        If there is no such file. :func:`fetch` has the errors of an address of the hub.
    FormatError
        If the file is malformed or incomplete, or its architecture is unknown.
    ValueError
        If a device does not exist or a parameter is out of range.
    OutOfMemoryError
        If the devices have too little memory. Nothing was allocated, and the message proposes options that fit; see
        :func:`~ggml_cffi.models.plan`.
    """
    check_options(split, n_batch)
    chosen = None if devices is None else device_list(devices)
    refuse_hypothetical(chosen)
    workload, dtype, kept = Workload(n_sequences, expected_tokens), as_type(kv_dtype), parse_reserve(reserve)
    from ggml_cffi.models.hub import local_path  # slow to import

    file = GGUFFile(local_path(path))
    backends: list[Backend] = []
    runners: list[Runner] = []
    try:
        architecture = architecture_of(file)
        context = context_of(architecture, n_ctx)
        options = LoadOptions(check_kv_slots(kv_slots, context), n_batch, dtype, kept, repack)
        planner, found = place_on_devices(
            lambda opened: Planner(architecture, opened, options, balance, chosen, split, workload),
            open_backends(chosen, n_threads),
            chosen,
            n_threads,
            compare=split == "auto",
        )
        backends = [*planner.backends]
        check_fits(planner, found)
        if deterministic:
            _make_deterministic(backends, found)
        for runner in open_runners(architecture, backends, options, found, progress):
            runners.append(runner)
        plan = report(planner, found, propose=False)
        sizes = {"n_ctx": context, "n_batch": n_batch}
        return Model(file, architecture, backends, runners, plan, **sizes, deterministic=deterministic)
    except BaseException:
        for part in (*runners, *backends, file):
            part.close()
        raise


def open_runners(
    architecture: Architecture,
    backends: Sequence[Backend],
    options: LoadOptions,
    found: Placement,
    progress: Progress | None = None,
) -> Iterator[Runner]:
    """Load the weights, and yield one runner, or one for each replica.

    Raises
    ------
    OutOfMemoryError
        If a device has less memory than it reported.
    """
    n_batch = min(options.n_batch, options.n_ctx)
    parts = found.replicas or (found,)
    for i, part in enumerate(parts):
        own = [backends[k] for k in part.members]
        report = _replica_progress(progress, i, len(parts))
        if part.stages:
            yield PipelineRunner(
                architecture,
                own,
                options.n_ctx,
                n_batch,
                options.kv_dtype,
                report,
                stages=part.stages,
                whole_attention=part.whole_attention,
                in_flight=part.split == "pipeline",
            )
        else:
            yield ScheduledRunner(
                architecture,
                own,
                options.n_ctx,
                n_batch,
                options.kv_dtype,
                report,
                layer_devices=part.layer_devices,
                op_offload=part.op_offload,
                compute_bytes=[plan.compute_bytes for plan in part.devices],
                shared_cpu=len(parts) > 1,
                repack=options.repacks(own, architecture.weight_bytes),
            )


def _make_deterministic(backends: Sequence[Backend], found: Placement) -> None:
    """Fix the number of CPU threads, and raise ValueError if replicas are on devices of different kinds."""
    for backend in backends:
        backend.follows_load = False
    check_one_kind({tuple(backends[i].device.description for i in part.members) for part in found.replicas or ()})


def check_one_kind(kinds: Collection[object]) -> None:
    """Raise ValueError if the deterministic replicas of a model are on devices of several kinds."""
    if len(kinds) > 1:
        raise ValueError(
            "replicas on devices of different kinds round in different ways: for deterministic=True choose devices of "
            "one kind, or split='layer'"
        )


def _replica_progress(progress: Progress | None, i: int, n: int) -> Progress | None:
    """Return the progress callback of the ``i``-th of ``n`` replicas."""
    if progress is None or n == 1:
        return progress
    report = progress
    return lambda done, total: report(i * total + done, n * total)

"""Quantization of whole model files: the type that each tensor gets, and the new file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import numpy.typing as npt

from ggml_cffi import c
from ggml_cffi.core import dtypes
from ggml_cffi.core.progress import Progress
from ggml_cffi.core.text import count
from ggml_cffi.core.threads import default_threads
from ggml_cffi.enums import GGUFType, Type
from ggml_cffi.files.file_types import FileType, file_type_of
from ggml_cffi.files.gguf.header import TensorInfo
from ggml_cffi.files.gguf.layout import PlannedTensor
from ggml_cffi.files.gguf.reader import GGUFFile
from ggml_cffi.files.gguf.values import GGUFValue
from ggml_cffi.files.gguf.writer import write_tensors
from ggml_cffi.files.quantization import Importances, check_importances

T = Type

# Parts of the names of weights that keep their type: they are small, and route tokens or encode positions.
_UNQUANTIZED_NAMES = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "position_embd",
    "token_types.weight",
    "attn_rel_b.weight",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "time_mix_first.weight",
    "time_mix_w0.weight",
    "time_mix_w1.weight",
    "time_mix_w2.weight",
    "time_mix_v0.weight",
    "time_mix_v1.weight",
    "time_mix_v2.weight",
    "time_mix_a0.weight",
    "time_mix_a1.weight",
    "time_mix_a2.weight",
    "time_mix_g1.weight",
    "time_mix_g2.weight",
    "time_mix_decay_w1.weight",
    "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    ".patch_embd",
    ".patch_merger",
    ".rel_pos",
    "sam.pos_embd",
    "sam.neck.",
    "sam.net_",
    "a.rvq.codebook",
    "mm.a.code_embd",
)
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_OUTPUT = "output.weight"

# Used if rows do not fill whole blocks: a type of about the same precision with blocks of 32.
_FALLBACK_TYPES = {
    **dict.fromkeys((T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS, T.IQ3_S, T.IQ4_XS), T.IQ4_NL),
    **dict.fromkeys((T.Q2_0, T.Q2_K, T.Q3_K, T.TQ1_0, T.TQ2_0), T.Q4_0),
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
}
# The output head (or the embeddings, if tied) gets more precision: its errors change every token.
_OUTPUT_TYPES = {
    **dict.fromkeys((T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS), T.Q5_K),
    T.MXFP4: T.Q8_0,
    T.Q8_0: T.Q8_0,
}
_EMBEDDING_TYPES = {
    **dict.fromkeys((T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS), T.Q2_K),
    **dict.fromkeys((T.IQ2_S, T.IQ3_XXS), T.IQ3_S),
    **dict.fromkeys((T.TQ1_0, T.TQ2_0, T.Q2_0), T.Q4_K),
}
_NEEDS_IMATRIX = frozenset({T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS})


def quantize_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dtype: Type | str,
    *,
    only: str | Iterable[str] | None = None,
    keep: str | Iterable[str] | None = None,
    imatrix: Mapping[str, npt.ArrayLike] | None = None,
    allow_requantize: bool = False,
    max_bytes: int | None = None,
    overwrite: bool = True,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """Write the model ``source`` with its weights in another type.

    Memory stays small for any model size. The write is atomic: ``target`` appears when it is complete, and an exception
    leaves nothing behind. ``target`` may be ``source`` itself.

    Parameters
    ----------
    source
        A GGUF file; of a split model the first.
    target
        The file to write.
    dtype
        The type, such as ``"q4_k"``, or a mixture of llama.cpp, such as ``"q4_k_m"``. :func:`choose_types` describes
        which tensors get it.
    only, keep
        Patterns of names (``"blk.*.ffn_*"``). Tensors that do not match ``only``, or match ``keep``, keep their type.
    imatrix
        Name of a tensor to the importance of each column, as :func:`quantize` and :func:`read_imatrix` define it.
        Types below 3 bits, IQ3_XXS and Q2_K_S need one.
    allow_requantize
        True to quantize weights again that are quantized in ``source``: they get the errors of both types. By default
        such weights are refused, unless they keep their type or become F32, F16 or BF16.
    max_bytes, overwrite
        See :func:`write_gguf`.
    threads
        Number of threads. Default: one per processor of this process.
    progress
        Called with the bytes written so far and the bytes in all.

    Returns
    -------
    tuple of str
        Paths of the files.

    Raises
    ------
    FormatError
        If ``source`` is not a valid GGUF file.
    TypeError, ValueError
        If weights cannot have the type, weights are quantized already, values are not finite, importances are missing
        or do not fit, a pattern matches no tensor, or ``threads`` is below 1.
    FileExistsError, OSError
        See :func:`write_gguf`.
    """
    from concurrent.futures import ThreadPoolExecutor  # slow to import

    file_type = file_type_of(dtype)
    n_threads = threads if threads is not None else default_threads()
    if n_threads < 1:
        raise ValueError(f"threads must be at least 1, not {n_threads}")
    with GGUFFile(source) as file:
        types = choose_types(file, dtype, only=only, keep=keep)
        if not allow_requantize:
            _refuse_quantized(file, types)
        tensors = []
        for name, info in file.tensors.items():
            weights = _importances_for(info, types[name], file_type, imatrix or {})
            tensors.append(PlannedTensor(name, types[name], info.shape, file[name], weights))
        fields = {
            **file.fields,
            "general.quantization_version": GGUFValue(c.GGML_QNT_VERSION, GGUFType.UINT32),
            "general.file_type": GGUFValue(file_type.number, GGUFType.UINT32),
        }
        pool = ThreadPoolExecutor(n_threads, thread_name_prefix="ggml_cffi quantize")
        try:
            return write_tensors(
                os.fspath(target),
                fields,
                tensors,
                max_bytes=max_bytes,
                overwrite=overwrite,
                progress=progress,
                pool=pool,
                ahead=2 * n_threads,
            )
        finally:
            pool.shutdown(cancel_futures=True)


def choose_types(
    file: GGUFFile,
    dtype: Type | str,
    *,
    only: str | Iterable[str] | None = None,
    keep: str | Iterable[str] | None = None,
) -> dict[str, Type]:
    """Choose the type that :func:`quantize_file` gives each tensor of a model.

    Weights (``*weight``) with two axes or more get ``dtype``. Norms, biases, and small weights that route tokens or
    encode positions keep their type. As in llama.cpp, the output head, or the token embeddings if they serve as the
    head, get Q6_K (Q5_K if ``dtype`` is below 3 bits; Q8_0 stays Q8_0). If ``dtype`` is below 3 bits, other token
    embeddings get a finer type.

    A mixture gives the weights that matter most a finer type than the others, as llama.cpp does: values of the
    attention, its output, and the second product of the feed-forward part. The mixtures are ``q2_k``, ``q2_k_s``,
    ``q3_k_s``, ``q3_k_m``, ``q3_k_l``, ``q4_k_s``, ``q4_k_m``, ``q5_k_s`` and ``q5_k_m``. In llama.cpp, ``q3_k``,
    ``q4_k`` and ``q5_k`` are other names of ``_m``; here they are one type.

    If rows do not fill whole blocks, a weight gets a type with smaller blocks: Q5_0 for Q4_K, Q5_1 for Q5_K, Q8_0 for
    Q6_K, Q4_0 for Q2_K and Q3_K, IQ4_NL for IQ types; F16 if these do not fit either.

    Returns
    -------
    dict
        Name of a tensor to its type.

    Raises
    ------
    TypeError
        If the type does not exist, or weights are not stored in it.
    ValueError
        If a pattern matches no tensor.
    """
    file_type = file_type_of(dtype)
    finer = file_type.finer_types(file)
    wanted = _matching(file, only) if only is not None else set(file.tensors)
    wanted -= _matching(file, keep) if keep is not None else set()
    tied = _OUTPUT not in file.tensors
    return {
        name: _type_for(info, file_type.dtype, finer.get(name), tied)
        if name in wanted and _is_weight(info)
        else info.dtype
        for name, info in file.tensors.items()
    }


def _refuse_quantized(file: GGUFFile, types: Mapping[str, Type]) -> None:
    """Raise ``ValueError`` if quantized weights would be quantized again."""
    found = {
        name: info.dtype
        for name, info in file.tensors.items()
        if types[name] is not info.dtype and dtypes.is_quantized(info.dtype) and dtypes.is_quantized(types[name])
    }
    if found:
        kinds = ", ".join(dict.fromkeys(dtype.name for dtype in found.values()))
        raise ValueError(
            f"{file.path}: {count(len(found), 'weight')} would be quantized a second time (from {kinds}), which adds "
            "errors: start from the F32, F16 or BF16 model, or allow it with allow_requantize (--allow-requantize)"
        )


def _matching(file: GGUFFile, patterns: str | Iterable[str]) -> set[str]:
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        names = {name for name in file.tensors if fnmatchcase(name, pattern)}
        if not names:
            raise ValueError(f"{file.path} has no tensor that matches {pattern!r}")
        found |= names
    return found


def _is_weight(info: TensorInfo) -> bool:
    matrix = any(n > 1 for n in info.shape[:-1])
    number = info.dtype not in dtypes.INTEGERS and info.dtype not in dtypes.INTERNAL
    kept = any(part in info.name for part in _UNQUANTIZED_NAMES)
    return matrix and number and info.name.endswith("weight") and not kept


def _type_for(info: TensorInfo, element_type: Type, finer: Type | None, tied: bool) -> Type:
    """Return the type of a weight: ``finer`` in place of ``element_type`` if a mixture has one for it."""
    n = info.shape[-1]
    if not dtypes.is_quantized(element_type):
        return element_type
    if info.name == _OUTPUT or (tied and info.name in _EMBEDDINGS):
        element_type = Type.Q8_0 if n % dtypes.block_size(element_type) else _OUTPUT_TYPES.get(element_type, Type.Q6_K)
    elif info.name in _EMBEDDINGS:
        element_type = _EMBEDDING_TYPES.get(element_type, element_type)
    elif finer is not None:
        element_type = finer
    if n % dtypes.block_size(element_type):
        element_type = _FALLBACK_TYPES.get(element_type, element_type)
    return Type.F16 if n % dtypes.block_size(element_type) else element_type


def _importances_for(
    info: TensorInfo, element_type: Type, file_type: FileType, imatrix: Mapping[str, npt.ArrayLike]
) -> Importances | None:
    """Return the checked importances of a tensor for ``element_type``; None if the type does not use them."""
    if element_type is info.dtype or not dtypes.is_quantized(element_type):
        return None
    if info.name in imatrix:
        try:
            return check_importances(imatrix[info.name], info.shape)
        except ValueError as error:
            raise ValueError(f"tensor {info.name!r}: {error}") from None
    in_mixture = file_type.needs_imatrix and element_type is file_type.dtype and info.name not in _EMBEDDINGS
    if element_type in _NEEDS_IMATRIX or in_mixture:
        reason = "the importance matrix has no entry for it" if imatrix else "imatrix is missing"
        name = file_type.name if in_mixture else element_type.name
        raise ValueError(f"tensor {info.name!r}: {name} needs importances, but {reason}")
    return None

"""Hugging Face folders to GGUF files: tensors under GGUF's names, sizes and vocabulary as metadata.

Names, keys and the layout of vocabularies are those of llama.cpp's files.
"""

from __future__ import annotations

import os

from ggml_cffi.core import dtypes
from ggml_cffi.enums import Type
from ggml_cffi.errors import FormatError
from ggml_cffi.files.gguf.writer import write_gguf
from ggml_cffi.models.convert.bert import BERT
from ggml_cffi.models.convert.huggingface import Family, Source

#: What can be converted, by the class that ``config.json`` names. A new family is one more file, and a line here.
FAMILIES: dict[str, Family] = {"BertModel": BERT, "BertForMaskedLM": BERT, "BertForPreTraining": BERT}

#: Types of matrices, with llama.cpp's numbers for files of mostly that type (``general.file_type``).
_FILE_TYPES = {Type.F32: 0, Type.F16: 1, Type.BF16: 32, Type.Q8_0: 7}


def convert(folder: str | os.PathLike[str], target: str | os.PathLike[str], dtype: Type | str = Type.F16) -> None:
    """Convert a Hugging Face folder to a GGUF file.

    Parameters
    ----------
    folder
        With ``config.json``, ``model.safetensors`` (or several, and ``model.safetensors.index.json``), and
        ``tokenizer.json`` or ``vocab.txt``. What sentence-transformers adds (``modules.json``,
        ``sentence_bert_config.json``) is used where it is there.
    target
        The file to write; it has its name only once it is complete.
    dtype
        Type of the matrices: ``f32``, ``f16``, ``bf16`` or ``q8_0``. Norms, biases and tables of positions stay F32.

    Raises
    ------
    FileNotFoundError
        If the folder lacks a file.
    FormatError
        If the model is of a kind that is not supported, or a file is malformed.
    ImportError
        If the ``safetensors`` library is not there.
    TypeError
        If there is no such type, or it is not among those above.
    """
    chosen = dtypes.as_type(dtype)
    if chosen not in _FILE_TYPES:
        raise TypeError(f"cannot convert to {chosen.name}: {', '.join(t.name for t in _FILE_TYPES)} are possible")
    source = Source(folder)
    names = source.config.get("architectures")
    kind = names[0] if isinstance(names, list) and names else None
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise FormatError(f"{source.folder}: {kind!r} cannot be converted; {', '.join(FAMILIES)} can")
    try:
        specific = family.metadata(source)
    except (KeyError, TypeError, AttributeError) as error:  # JSON, but of another structure
        raise FormatError(f"{source.folder}: a JSON file is not as {kind} has it: {error!r}") from error
    metadata = {
        "general.architecture": family.architecture,
        "general.name": source.folder.resolve().name,
        "general.file_type": _FILE_TYPES[chosen],
        "general.quantization_version": 2,
        **specific,
    }
    with source.weights() as weights:
        tensors = {}
        for name, tensor in weights.items():
            known = family.rename(name)
            if known is not None:
                tensors[known] = tensor, family.type_of(known, tensor.shape, chosen)
        write_gguf(target, metadata, tensors)

"""Entry point of the conversion of a Hugging Face folder to a GGUF file.

Tensor names, metadata keys and the layout of vocabularies agree with files that llama.cpp writes.
"""

from __future__ import annotations

import os

from ggml_cffi.core import dtypes
from ggml_cffi.core.progress import Progress
from ggml_cffi.enums import Type
from ggml_cffi.errors import FormatError
from ggml_cffi.files.gguf.writer import write_gguf
from ggml_cffi.models.convert.bert import BERT
from ggml_cffi.models.convert.huggingface import HuggingFaceFolder, ModelFamily

#: Model families by the class that ``config.json`` names. A new family is one file in this folder and one line here.
MODEL_FAMILIES: dict[str, ModelFamily] = {"BertModel": BERT, "BertForMaskedLM": BERT, "BertForPreTraining": BERT}

#: Types that matrices can have, with the number of each in ``general.file_type``, as llama.cpp defines it.
_FILE_TYPES = {Type.F32: 0, Type.F16: 1, Type.BF16: 32, Type.Q8_0: 7}


def convert(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dtype: Type | str = Type.F16,
    *,
    progress: Progress | None = None,
) -> None:
    """Convert a Hugging Face folder to a GGUF file.

    Parameters
    ----------
    folder
        A folder with ``config.json``, ``model.safetensors`` (or several files and ``model.safetensors.index.json``),
        and ``tokenizer.json`` or ``vocab.txt``. The files of sentence-transformers (``modules.json``,
        ``sentence_bert_config.json``) are used if the folder has them.
    target
        The file to write. The write is atomic: the name appears when the file is complete.
    dtype
        Type of the matrices: ``f32``, ``f16``, ``bf16`` or ``q8_0``. Norms, biases and position tables stay F32.
    progress
        Called with the bytes written so far and the bytes in all.

    Raises
    ------
    FileNotFoundError
        If the folder lacks a file.
    FormatError
        If the model family is not supported, or a file is malformed.
    ImportError
        If the ``safetensors`` library is not installed.
    TypeError
        If the type does not exist, or is not one of the four above.
    """
    chosen = dtypes.as_type(dtype)
    if chosen not in _FILE_TYPES:
        raise TypeError(f"cannot convert to {chosen.name}; choose one of {', '.join(t.name for t in _FILE_TYPES)}")
    source = HuggingFaceFolder(folder)
    names = source.config.get("architectures")
    class_name = names[0] if isinstance(names, list) and names else None
    family = MODEL_FAMILIES.get(class_name) if isinstance(class_name, str) else None
    if family is None:
        raise FormatError(f"{source.folder}: class {class_name!r} cannot be converted; {', '.join(MODEL_FAMILIES)} can")
    try:
        specific = family.metadata(source)
    except (KeyError, TypeError, AttributeError) as error:  # valid JSON of another structure
        raise FormatError(
            f"{source.folder}: a JSON file has another structure than {class_name} needs: {error!r}"
        ) from error
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
        write_gguf(target, metadata, tensors, progress=progress)

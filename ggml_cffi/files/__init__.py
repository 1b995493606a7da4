"""Model files and the tensors in them: GGUF, safetensors, encoding and quantization. Nothing here needs a device."""

from typing import TYPE_CHECKING

from ggml_cffi.core.lazy_names import lazy_names

if TYPE_CHECKING:
    from ggml_cffi.files.gguf import GGUFFile, GGUFTensor, GGUFValue, Progress, TensorInfo, write_gguf
    from ggml_cffi.files.imatrix import read_imatrix
    from ggml_cffi.files.quantization import dequantize, quantize
    from ggml_cffi.files.requantize import choose_types, quantize_file
    from ggml_cffi.files.safetensors import SafeTensor, SafetensorsFile, from_safetensors
    from ggml_cffi.files.sources import LazyTensor, RawTensor, StoredTensor

__getattr__ = lazy_names(
    __name__,
    {
        "ggml_cffi.files.gguf": "GGUFFile GGUFTensor GGUFValue Progress TensorInfo write_gguf",
        "ggml_cffi.files.imatrix": "read_imatrix",
        "ggml_cffi.files.quantization": "dequantize quantize",
        "ggml_cffi.files.requantize": "choose_types quantize_file",
        "ggml_cffi.files.safetensors": "SafeTensor SafetensorsFile from_safetensors",
        "ggml_cffi.files.sources": "LazyTensor RawTensor StoredTensor",
    },
)

__all__ = [
    "GGUFFile",
    "GGUFTensor",
    "GGUFValue",
    "LazyTensor",
    "Progress",
    "RawTensor",
    "SafeTensor",
    "SafetensorsFile",
    "StoredTensor",
    "TensorInfo",
    "choose_types",
    "dequantize",
    "from_safetensors",
    "quantize",
    "quantize_file",
    "read_imatrix",
    "write_gguf",
]

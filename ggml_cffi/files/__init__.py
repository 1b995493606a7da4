"""Model files and the tensors in them: GGUF, safetensors, encoding and quantization. Nothing here needs a device."""

from ggml_cffi.files.gguf import GGUFFile, GGUFTensor, GGUFValue, Progress, TensorInfo, write_gguf
from ggml_cffi.files.imatrix import read_imatrix
from ggml_cffi.files.quantization import dequantize, quantize
from ggml_cffi.files.requantize import choose_types, quantize_file
from ggml_cffi.files.safetensors import SafeTensor, SafetensorsFile, from_safetensors
from ggml_cffi.files.sources import LazyTensor, RawTensor, StoredTensor

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

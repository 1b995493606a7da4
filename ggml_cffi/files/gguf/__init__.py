"""GGUF files: values, header and reader; layout and writer; models that are split over several files."""

from ggml_cffi.core.progress import Progress
from ggml_cffi.files.gguf.header import TensorInfo
from ggml_cffi.files.gguf.reader import GGUFFile, GGUFTensor
from ggml_cffi.files.gguf.values import GGUFValue
from ggml_cffi.files.gguf.writer import write_gguf

__all__ = ["GGUFFile", "GGUFTensor", "GGUFValue", "Progress", "TensorInfo", "write_gguf"]

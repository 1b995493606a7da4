"""Sets of operations that several packages use."""

from ggml_cffi.enums import Op

#: Operations that compute nothing: leaves, and views of a tensor's memory.
VIEWS = frozenset({Op.VIEW, Op.RESHAPE, Op.PERMUTE, Op.TRANSPOSE, Op.NONE})

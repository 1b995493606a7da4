"""Arrays as those of other libraries, which numpy cannot read without help."""

import ctypes

import numpy as np

_BFLOAT = 4
_CODE = {b"dltensor": 20, b"dltensor_versioned": 52}  # bytes before the kind of numbers in a capsule


class OnlyDLPack:
    """An array that offers DLPack and no other protocol."""

    def __init__(self, array):
        self.array, self.ndim = array, array.ndim

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Bfloat16(OnlyDLPack):
    """An array of bfloat16 that offers DLPack only, as those of PyTorch. numpy refuses its capsules."""

    def __init__(self, values):
        bits = np.asarray(values, np.float32).view(np.uint32) >> 16
        super().__init__(np.asarray(bits, np.uint16))  # an array even without axes

    def __dlpack__(self, **options):
        capsule = super().__dlpack__(**options)
        api = ctypes.pythonapi
        api.PyCapsule_GetName.argtypes, api.PyCapsule_GetName.restype = [ctypes.py_object], ctypes.c_char_p
        api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
        api.PyCapsule_GetPointer.restype = ctypes.c_void_p
        name = api.PyCapsule_GetName(capsule)
        ctypes.c_uint8.from_address(api.PyCapsule_GetPointer(capsule, name) + _CODE[name]).value = _BFLOAT
        return capsule


class Parameter:
    """An array that requires gradients, as ``torch.nn.Parameter``: its values can be read after ``detach()``."""

    requires_grad = True

    def __init__(self, values):
        self.values = values
        self.ndim = values.ndim

    def detach(self):
        return self.values

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")

    def __dlpack__(self, **options):
        raise BufferError("Can't export tensors that require gradient, use tensor.detach()")

    def __dlpack_device__(self):
        return 1, 0

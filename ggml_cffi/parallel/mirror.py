"""A host block in the memory of a device that does not read host memory, with copies before and after a run."""

from __future__ import annotations

from ggml_cffi import c
from ggml_cffi.core.backend import Backend
from ggml_cffi.core.transfer import DeviceBytes, HostBlock


class Mirror:
    """Copies between a host block and the device's buffer of the same size, in order with the device's other work.

    Parameters
    ----------
    backend
        The backend of the device.
    block
        The block, with that buffer.
    n_input_bytes
        Bytes of inputs, which begin the block.
    results
        Bytes of results, from and to.

    C: ``ggml_backend_tensor_set_async``, ``ggml_backend_tensor_get_async``.
    """

    def __init__(self, backend: Backend, block: HostBlock, n_input_bytes: int, results: slice) -> None:
        self.n_input_bytes = n_input_bytes
        """Bytes of inputs that the next run reads."""
        self._backend, self._memory = backend, c.ffi.from_buffer(block.memory)
        on_device = DeviceBytes.of_buffer(block.buffers[backend.device])
        self._device = on_device  # keeps the descriptions of its parts
        self._inputs = on_device.part(0, max(n_input_bytes, 1))
        n = results.stop - results.start
        self._get = (on_device.part(results.start, n), self._memory + results.start, 0, n)

    def send(self) -> None:
        """Copy the inputs to the device. The caller holds the device, and waits before it writes the block again."""
        if self.n_input_bytes:
            c.ggml_backend_tensor_set_async(self._backend.ptr, self._inputs, self._memory, 0, self.n_input_bytes)

    def receive(self) -> None:
        """Copy the results to the block, and wait."""
        c.ggml_backend_tensor_get_async(self._backend.ptr, *self._get)
        c.ggml_backend_synchronize(self._backend.ptr)

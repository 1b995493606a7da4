"""The flat API: functions with the names and the order of arguments of C and its R binding.

A script ports line by line onto the safe objects of this package. No call ends the process, errors are exceptions, and
objects may be freed in any order, twice, or not at all.

>>> from ggml_cffi.flat import *
>>> ctx = ggml_init(16 * 1024 * 1024)
>>> a = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 3, 2)  # ne0 = 3 is contiguous: numpy's (2, 3)
>>> ggml_set_f32(a, [1, 2, 3, 4, 5, 6])
>>> graph = ggml_build_forward_expand(ctx, ggml_sum_rows(ctx, a))
>>> sched = ggml_backend_sched_new([ggml_backend_cpu_init()])
>>> ggml_backend_sched_graph_compute(sched, graph)
<Status.SUCCESS: 0>
>>> ggml_get_f32(graph.outputs[0])
array([ 6., 15.], dtype=float32)

* Sizes and axes are in ggml's order here, the contiguous axis first. Attributes of the objects stay numpy's:
  ``a.shape``.
* Devices and backends are counted from 0.
* All operation builders of ``ggml.h`` are here, except ``ggml_flash_attn_back``, which always ends the process.
* Values can be set at any time. The values of a tensor without memory are kept until the scheduler allocates it.

``devices``, ``tensors``, ``values``, ``graphs`` and ``schedulers`` have the functions of these subjects. The operations
are generated from the headers.
"""

from ggml_cffi.flat import _ops, devices, graphs, schedulers, tensors, values
from ggml_cffi.flat._ops import *  # noqa: F403
from ggml_cffi.flat.devices import *  # noqa: F403
from ggml_cffi.flat.graphs import *  # noqa: F403
from ggml_cffi.flat.schedulers import *  # noqa: F403
from ggml_cffi.flat.tensors import *  # noqa: F403
from ggml_cffi.flat.values import *  # noqa: F403

__all__: list[str] = []
__all__ += devices.__all__
__all__ += graphs.__all__
__all__ += schedulers.__all__
__all__ += tensors.__all__
__all__ += values.__all__
__all__ += _ops.__all__

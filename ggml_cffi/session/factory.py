"""Results of a user's factory (the ``make`` argument), opened for use in worker processes and replicas."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from ggml_cffi.session.compiled import CompiledFunction


def open_product(product: Any, stack: ExitStack) -> Any:
    """Open the object that a factory returned, and register its closing with ``stack``.

    Parameters
    ----------
    product
        The object. A context manager is entered: a session, a model, a worker, or the result of a function decorated
        with ``contextlib.contextmanager``. If the object is a compiled function, its session is closed at the end. Any
        other object is used as it is.
    stack
        The exit stack that closes the product.

    Returns
    -------
    Any
        The object to use: the result of ``__enter__`` for a context manager, else ``product``.
    """
    if isinstance(product, CompiledFunction):
        stack.callback(product.session.close)
    elif hasattr(type(product), "__enter__"):
        return stack.enter_context(product)
    return product

"""What a user's ``make`` function gives, opened for use: one rule for worker processes and for replicas."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from ggml_cffi.session.session import Compiled


def opened(made: Any, stack: ExitStack) -> Any:
    """What to use of ``made``; ``stack`` closes it.

    A context manager is entered, which a session, a model, a worker and a function decorated with
    ``contextlib.contextmanager`` all are. A compiled function takes its session with it. Anything else is used as it
    is.
    """
    if isinstance(made, Compiled):
        stack.callback(made.session.close)
    elif hasattr(type(made), "__enter__"):
        return stack.enter_context(made)
    return made

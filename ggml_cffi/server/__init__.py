"""Models behind HTTP, with OpenAI's interface: chats, completions, embeddings, tool calls, JSON, streams.

``app`` makes the application of FastAPI, ``catalog`` loads and unloads the models, ``engine`` generates the answers of
many clients together, ``isolated`` does so in a process of its own, and ``replicated`` in one for each replica.
``chat``, ``completions``, ``embeddings``, ``responses``, ``tokens`` and ``system`` have the routes. Needs the extra
``serve``.

>>> from ggml_cffi import server
>>> app = server.create_app({"smollm2": "smollm2.gguf"})  # doctest: +SKIP
"""

from ggml_cffi.server.app import create_app
from ggml_cffi.server.catalog import Catalog, ModelSpec
from ggml_cffi.server.errors import ApiError, QueueFullError

__all__ = ["ApiError", "Catalog", "ModelSpec", "QueueFullError", "create_app"]

"""Sessions and models in a process of their own: a crash there is an exception here."""

from ggml_cffi.isolate.worker import Remote, Stream, Worker

__all__ = ["Remote", "Stream", "Worker"]

"""Worker processes: sessions and models in a process of their own, where a crash becomes an exception here.

``worker`` has :class:`Worker`, the user's side. ``process`` is one process of a worker as the parent sees it, ``child``
is the program that runs in it, and ``channel`` is the IPC channel between the two.
"""

from ggml_cffi.isolate.worker import Stream, Worker, WorkerFunction

__all__ = ["Stream", "Worker", "WorkerFunction"]

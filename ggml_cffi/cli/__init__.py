"""The command ``ggml-cffi``: one module per command."""

from ggml_cffi.cli.main import main

__all__ = ["main"]

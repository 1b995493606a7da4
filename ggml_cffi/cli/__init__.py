"""The command ``ggml-cffi``: ``main`` has the parser and reports errors, every other module is one command.

A command's module has ``register``, which adds its arguments to the parser, and a function that runs it and returns the
exit code. Modules with an underscore are shared by the commands.
"""

from ggml_cffi.cli.main import main, make_parser

__all__ = ["main", "make_parser"]

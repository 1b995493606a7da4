"""Tool calls as Python text: ``weather(city="Rome")``."""

from __future__ import annotations

import ast
import json

from ggml_cffi.models.chat_parser.tools import Tools


def read_calls(text: str, tools: Tools) -> list[tuple[str, str]]:
    """Return name and arguments (JSON) of each call in ``text``: of one on each line, or of a list of calls.

    Raises
    ------
    ValueError
        If ``text`` is anything else, or an argument is no constant, or has neither a name nor a known position.
    """
    try:
        nodes = [statement.value for statement in ast.parse(text.strip()).body if isinstance(statement, ast.Expr)]
        if len(nodes) == 1 and isinstance(nodes[0], ast.List | ast.Tuple):
            nodes = nodes[0].elts
        calls = [_read_call(node, tools) for node in nodes]
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"no Python calls: {error}") from None
    if not calls or len(calls) != len(nodes):
        raise ValueError("no Python calls")
    return calls


def _read_call(node: ast.expr, tools: Tools) -> tuple[str, str]:
    if not isinstance(node, ast.Call):
        raise ValueError("no call")
    name = ast.unparse(node.func)
    if name == "print" and len(node.args) == 1 and isinstance(node.args[0], ast.Call):  # as Gemma 3 writes it
        return _read_call(node.args[0], tools)
    if len(node.args) > len(tools.parameters(name)) or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("an argument has no name")
    arguments = dict(zip(tools.parameters(name), map(ast.literal_eval, node.args), strict=False))
    arguments |= {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    return name, json.dumps(arguments, ensure_ascii=False, allow_nan=False)

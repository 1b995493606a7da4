"""Turns the public headers of the pinned ggml into the Python files marked as generated.

``python -m codegen`` writes them, ``python -m codegen --check`` says which are stale.
"""

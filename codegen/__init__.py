"""Generator of the Python files and docs that follow from the public headers of the pinned ggml.

``python -m codegen`` writes the files; ``python -m codegen --check`` lists those that are stale.
"""

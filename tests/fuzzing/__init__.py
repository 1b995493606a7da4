"""The fuzzer: random calls of every operation, and damaged GGUF files, each in a process that may die of it.

:mod:`fuzzing.calls` and :mod:`fuzzing.files` say what is tried (hypothesis strategies), :mod:`fuzzing.perform` does it,
:mod:`fuzzing.child` has it done in another process and names how that died, and :mod:`fuzzing.hunt` counts, and has
hypothesis shrink what should not happen.
"""

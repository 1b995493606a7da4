"""Fuzzer: random calls of every operation, and damaged GGUF files, in child processes that may crash.

:mod:`fuzzing.calls` and :mod:`fuzzing.files` draw jobs as hypothesis strategies. :mod:`fuzzing.perform` performs calls.
:mod:`fuzzing.child` runs jobs in a child process and reports how it ended. :mod:`fuzzing.hunt` counts outcomes and lets
hypothesis shrink the jobs that show a defect.
"""

"""Helpers for tests of models on several devices."""

import ggml_cffi as ggml

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


def gpu_memory(monkeypatch, free):
    """Patch GPUs to report this number of free bytes."""
    real = ggml.Device.memory
    monkeypatch.setattr(ggml.Device, "memory", lambda self: real(self) if self.is_cpu else ggml.Memory(free, free))


def answers(model, prompts, n=3):
    return [[*model.generate_tokens(ids, n, stop_at_end=False)] for ids in prompts]

"""The pictures of the README and of these pages, drawn by ``ggml_cffi.viz`` from real runs.

``python docs/make_pictures.py`` writes them to ``docs/images/``. It needs two Vulkan devices:
``GGML_VK_VISIBLE_DEVICES=0,0`` makes two of one, software devices included.
"""

import sys
from pathlib import Path

import numpy as np

import ggml_cffi as ggml

IMAGES = Path(__file__).parent / "images"
N_VOCAB, N_EMBD, N_FF = 256, 64, 128


def two_gpus(path: Path) -> None:
    """Draw a small model: embeddings on the CPU, a feed-forward layer over two GPUs, and an output head."""
    rng = np.random.default_rng(0)
    gpus = [device for device in ggml.devices() if not device.is_cpu][:2]
    if len(gpus) < 2:
        sys.exit("two Vulkan devices are needed: GGML_VK_VISIBLE_DEVICES=0,0 makes two of one")

    def values(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32) / 8

    table, head = values(N_VOCAB, N_EMBD), values(N_VOCAB, N_EMBD)
    ups, downs = [values(N_FF, N_EMBD) for _ in gpus], [values(N_EMBD, N_FF) for _ in gpus]
    with ggml.Session(gpus) as session:
        embedding = session.weight(table, on="CPU", name="embedding")
        up = [session.weight(w, on=gpu, name=f"up.{i}") for i, (w, gpu) in enumerate(zip(ups, gpus, strict=True))]
        down = [session.weight(w, on=gpu, name=f"down.{i}") for i, (w, gpu) in enumerate(zip(downs, gpus, strict=True))]
        output = session.weight(head, on=gpus[1], name="head")

        @session.compile
        def model(ids: ggml.Tensor) -> ggml.Tensor:
            x = named("x", ggml.get_rows(embedding, ids))
            parts = []
            for i in range(2):
                hidden = named(f"hidden.{i}", ggml.silu(named(f"rows.{i}", ggml.linear(x, up[i]))))
                parts.append(named(f"part.{i}", ggml.linear(hidden, down[i])))
            return named("logits", ggml.linear(named("sum", ggml.add(*parts)), output))

        ids = np.arange(4, dtype=np.int32)
        got = model(ids)
        hidden = [table[ids] @ w.T for w in ups]
        hidden = [h / (1 + np.exp(-h)) for h in hidden]
        want = sum(h @ w.T for h, w in zip(hidden, downs, strict=True)) @ head.T
        np.testing.assert_allclose(got, want, atol=2e-2 * np.abs(want).max())
        model.trace(ids).scheduler.draw(path)
    sys.stdout.write(f"{path}\n")


def named(name: str, tensor: ggml.Tensor) -> ggml.Tensor:
    """Return ``tensor`` under the name that the drawing shows."""
    tensor.name = name
    return tensor


if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    two_gpus(IMAGES / "two_gpus.svg")

"""A graph of a scheduler as a table, as a drawing, and as a profile with the time of each node.

Usage: see.py [FOLDER], the folder for the drawing and the trace (default: a temporary one).
"""

import json
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

import ggml_cffi as ggml


def main(folder: Path) -> None:
    """Compute ``sum(relu(x @ a.T)) + sum(relu(x @ b.T))``, each branch on a device of its own if there are two."""
    rng = np.random.default_rng(0)
    x, a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in ((8, 64), (96, 64), (96, 64)))
    devices = ggml.devices()[:2]
    with ggml.Context() as weights, ggml.Context() as work, ggml.Scheduler(devices) as scheduler:
        branches = []
        inputs = work.new_tensor(ggml.F32, x.shape, name="x")
        for name, values, device in (("a", a, devices[0]), ("b", b, devices[-1])):
            w = weights.new_tensor(ggml.F32, values.shape, name=name)
            weights.alloc(device, [w], usage=ggml.Usage.WEIGHTS)
            w.set(values)
            branches.append(ggml.sum(ggml.relu(ggml.linear(inputs, w))))
        outputs = ggml.add(*branches)
        with ggml.Graph(outputs) as graph:
            scheduler.alloc(graph)
            inputs.set(x)
            report = scheduler.report()
            print(report)
            drawing = scheduler.draw(folder / "graph.svg")
            profile = scheduler.profile(graph)
            print(f"\n{profile}")
            profile.trace(folder / "trace.json")
            want = np.maximum(x @ a.T, 0).sum() + np.maximum(x @ b.T, 0).sum()
            np.testing.assert_allclose(outputs.numpy(), want, rtol=1e-2)
            assert sum(split.n_nodes for split in report.splits) == len(profile.nodes) == len(graph)
            assert report.copied == sum(t.nbytes for t, _ in scheduler.copies)
    drawn = ElementTree.fromstring(drawing).findall(".//*[@class='node']")
    assert len(drawn) == report.n_nodes
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert sum(e.get("cat") == "node" for e in events) == report.n_nodes
    print(f"\n{folder / 'graph.svg'}: for a browser\n{folder / 'trace.json'}: for ui.perfetto.dev")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))

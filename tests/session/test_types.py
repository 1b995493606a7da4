"""The types that a type checker sees in a user's code."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import PATIENCE

pytest.importorskip("mypy")

_ARRAY = "numpy.ndarray[tuple[Any, ...], numpy.dtype[Any]]"

# Each line that ends with a comment reveals this type.
CODE = f"""\
from typing import Any

import numpy as np

import ggml_cffi as ggml
from ggml_cffi import models, parallel

x = np.ones((2, 3))
with ggml.Session("CPU") as session:
    w = session.weight(x)

    @session.compile
    def one(a: ggml.Tensor, scale: float = 2.0) -> ggml.Tensor:
        return (a @ w.T + x) * scale

    @session.compile
    def two(a: ggml.Tensor) -> tuple[ggml.Tensor, ggml.Tensor]:
        return a, -a

    @session.compile
    def three(a: ggml.Tensor) -> tuple[ggml.Tensor, ggml.Tensor, ggml.Tensor]:
        return a, a / 2, a**2

    @session.compile
    def named(a: ggml.Tensor) -> dict[str, ggml.Tensor]:
        return {{"a": a}}

    @session.compile
    def several(a: ggml.Tensor) -> list[ggml.Tensor]:
        return [a]

    @session.compile
    def mixed(a: ggml.Tensor) -> Any:
        return a, 3

    reveal_type(one(x))  # {_ARRAY}
    reveal_type(two(x))  # tuple[{_ARRAY}, {_ARRAY}]
    reveal_type(three(x)[2])  # {_ARRAY}
    reveal_type(named(x))  # dict[str, {_ARRAY}]
    reveal_type(several(x))  # list[{_ARRAY}]
    reveal_type(mixed(x))  # Any
    reveal_type(one.submit(x).result())  # {_ARRAY}
    reveal_type(session.compile(lambda a: w @ a)(x))  # Any

ggml.Session(["Vulkan0", ggml.device("CPU"), 0])
ggml.Session(ggml.device("CPU"))
models.load("m.gguf", "CPU", "tensor", balance=[1, 2])
split: models.SplitMode = "auto"
models.plan("m.gguf", split=split)
with parallel.TensorParallel("CPU") as group:

    @group.compile
    def shared(rank: parallel.Rank, a: ggml.Tensor) -> ggml.Tensor:
        return rank.all_reduce(a)

    reveal_type(shared(x))  # {_ARRAY}
"""

WRONG = {
    'models.load("m.gguf", split="sideways")': "split",
    'models.load("m.gguf", balance="best")': "balance",
    "ggml.Session(1.5)": "devices",
    "session.compile(3)": "compile",
}


@pytest.fixture
def check(tmp_path):
    """Return a function that returns mypy's lines about a program."""
    root = Path(__file__).parents[2]

    def run(code):
        (tmp_path / "user.py").write_text(code)
        command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(root / ".mypy_cache")]
        done = subprocess.run(
            [*command, "--config-file", str(root / "pyproject.toml"), str(tmp_path / "user.py")],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert not done.stderr
        return [line.split("user.py:", 1)[1] for line in done.stdout.splitlines() if "user.py:" in line]

    return run


@pytest.mark.slow
def test_results_of_compiled_functions_are_arrays(check):
    lines = check(CODE)
    wanted = {
        number: text.split("# ", 1)[1]
        for number, text in enumerate(CODE.splitlines(), 1)
        if text.lstrip().startswith("reveal_type")
    }
    revealed = {}
    for line in lines:
        number, rest = line.split(":", 1)
        assert 'Revealed type is "' in rest, line
        revealed[int(number)] = rest.split('"')[1]
    assert revealed == wanted


@pytest.mark.slow
def test_wrong_arguments_are_reported(check):
    head = "import ggml_cffi as ggml\nfrom ggml_cffi import models\nsession = ggml.Session()\n"
    lines = check(head + "\n".join(WRONG))
    errors = [line for line in lines if ": error:" in line]
    assert [int(line.split(":")[0]) for line in errors] == [4, 5, 6, 7], lines

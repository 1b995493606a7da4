"""The command ``perplexity``."""

import json

from tests.support.command import run


def test_perplexity_prints_one_line_or_json(smollm2, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    done = run("perplexity", smollm2, text, "--ctx", 32, "--devices", "CPU")
    assert done.stdout.startswith("perplexity ")
    found = json.loads(run("perplexity", smollm2, text, "--ctx", 32, "--devices", "CPU", "--json").stdout)
    assert 1 < found["perplexity"] < 100
    assert found["tokens"] == 15 * (len(text.read_text().split()) // 29)
    assert "do not fill a window" in run("perplexity", smollm2, text, "--devices", "CPU", code=2).stderr

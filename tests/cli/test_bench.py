"""The command ``bench``."""

import json

from tests.support.command import run


def test_bench_prints_a_table_or_json(smollm2):
    done = run("bench", smollm2, "--devices", "CPU", "-p", 16, "-n", 4, "-r", 2, "--threads", 2)
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["model", "size", "devices", "split", "test", "tokens/s"]
    assert [line.split()[5] for line in lines[1:]] == ["pp16", "tg4"]
    found = json.loads(run("bench", smollm2, "--devices", "CPU", "-p", 0, "-n", 4, "-r", 1, "--json").stdout)
    assert [(f["test"], f["devices"]) for f in found] == [("tg4", "CPU")]
    assert found[0]["tokens_per_second"] > 0
    assert "--rounds at least 1" in run("bench", smollm2, "-r", 0, code=2).stderr

"""The command ``fetch``."""

from tests.support.command import run


def test_an_unknown_model_cannot_be_fetched():
    assert "no model 'gpt5' to fetch" in run("fetch", "gpt5", code=2).stderr

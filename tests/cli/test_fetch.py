"""The command ``fetch``."""

from tests.support.command import run


def test_an_unknown_model_cannot_be_fetched():
    assert "there is no demonstration model 'gpt5'" in run("fetch", "gpt5", code=2).stderr

"""Progress bars and notices of the commands, on a terminal and without one."""

import sys
from pathlib import Path

from ggml_cffi import cli, models
from ggml_cffi.core.progress import notice
from tests.support import bert_float64, llama_float64


def test_commands_show_notices_on_a_terminal_only(monkeypatch, open_terminal, capsys):
    def plan(*_, **__):
        with notice("measuring, once"):
            raise ValueError("enough")

    monkeypatch.setattr(models, "plan", plan)
    assert cli.main(["plan", "m.gguf"]) == 2
    assert capsys.readouterr().err == "ggml-cffi: enough\n"
    shown = open_terminal()
    assert cli.main(["plan", "m.gguf"]) == 2
    assert "measuring, once" in shown.getvalue()
    assert capsys.readouterr().out == ""


def test_commands_have_bars_on_a_terminal(monkeypatch, tmp_path, rng, open_terminal, capsys):
    terminal = open_terminal()
    path = str(llama_float64.random_model(tmp_path / "m.gguf", rng))
    model = ["--devices", "CPU", "--threads", "1"]
    assert cli.main(["bench", path, *model, "-p", "4", "-n", "2", "-r", "1"]) == 0
    for label in ("loading", "measuring pp4 on CPU", "measuring tg2 on CPU"):
        assert label in terminal.getvalue()
    assert "tok" in terminal.getvalue()
    seen = []
    monkeypatch.setattr(models, "fetch", lambda name, progress: seen.append((name, progress(1, 2))) or "here")
    assert cli.main(["fetch", "smollm2"]) == 0
    assert seen == [("smollm2", None)]
    assert "downloading" in terminal.getvalue()

    def convert(_folder, target, _type, *, progress):
        progress(1, 2)
        bert_float64.random_model(Path(target), rng)

    # The package ``models.convert`` has the function's name.
    monkeypatch.setattr(sys.modules["ggml_cffi.models.convert.convert"], "convert", convert)
    assert cli.main(["convert", "folder", str(tmp_path / "b.gguf")]) == 0
    assert "converting" in terminal.getvalue()
    assert "\r" not in capsys.readouterr().out


def test_encoders_are_refused_before_anything_is_loaded(tmp_path, rng, run_main):
    path = bert_float64.random_model(tmp_path / "m.gguf", rng)
    text = tmp_path / "text"
    text.write_text("Some text.")
    for command in (("run", path, "-p", "Hi"), ("run", path), ("bench", path), ("perplexity", path, text)):
        error = run_main(*command, "--devices", "CPU", code=2)
        assert error.startswith(f"ggml-cffi: {path}: 'bert' is an encoder")
        assert "ggml-cffi embed" in error

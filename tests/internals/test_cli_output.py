"""Progress bars and lines of the commands."""

from ggml_cffi.cli._output import notice_line, progress_bar


def test_a_bar_counts_bytes_or_another_unit(open_terminal):
    terminal = open_terminal()
    with progress_bar("loading") as progress:
        progress(3 << 20, 4 << 20)
    assert "loading:" in terminal.getvalue()
    with progress_bar("scoring", "tok") as progress:
        progress(0, 1000)
        progress(1000, 1000)
    last = terminal.getvalue().split("scoring:")[-1]
    assert "tok" in last
    assert "B/s" not in last


def test_there_is_no_bar_without_a_terminal(capsys):
    with progress_bar("loading") as progress:
        assert progress is None
    assert capsys.readouterr().err == ""


def test_a_notice_is_a_line_that_goes_away(open_terminal):
    terminal = open_terminal()
    with notice_line("compiling shaders for Vulkan0, once"):
        assert terminal.getvalue().split("\r")[-1].startswith("compiling shaders for Vulkan0, once")
    assert terminal.getvalue().split("\r")[-2].strip() == ""

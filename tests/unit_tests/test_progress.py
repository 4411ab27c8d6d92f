import io
import sys
from collections.abc import Callable
from pathlib import Path

import build_corpus
import pytest

from megatron_echo.progress import track


class Terminal(io.StringIO):
    """What ``isatty`` says yes to."""

    def isatty(self) -> bool:
        return True


Streams = Callable[[], tuple[io.StringIO, Terminal]]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    """To be called in the test: standard output is a file, standard error a terminal."""

    def replace() -> tuple[io.StringIO, Terminal]:
        output, terminal = io.StringIO(), Terminal()
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(sys, "stderr", terminal)
        return output, terminal

    return replace


def test_a_terminal_sees_a_bar_that_goes_away(streams: Streams) -> None:
    _, terminal = streams()
    assert list(track([5, 6, 7], "counting")) == [5, 6, 7]
    shown = terminal.getvalue()
    assert "counting" in shown
    assert "100%" in shown
    assert shown.endswith("\x1b[2K"), "the line is erased"


def test_the_total_of_an_iterator_can_be_told(streams: Streams) -> None:
    _, terminal = streams()
    assert list(track(iter("ab"), "letters", total=4)) == ["a", "b"]
    assert "50%" in terminal.getvalue()


def test_prints_stay_out_of_the_bar(streams: Streams) -> None:
    """``python benchmarks/planner.py > table.md`` from a terminal: the table is in the file."""
    output, terminal = streams()
    for item in track(["row"], "rows"):
        print(item)
    assert output.getvalue() == "row\n"
    assert "row\n" not in terminal.getvalue()


def test_an_error_or_an_early_end_takes_the_bar_down(streams: Streams) -> None:
    _, terminal = streams()
    items = track([1, 2, 3], "counting")
    assert next(items) == 1
    items.close()
    hidden, shown = "\x1b[?25l", "\x1b[?25h"  # the cursor
    assert 0 <= terminal.getvalue().rfind(hidden) < terminal.getvalue().rfind(shown)

    def broken() -> None:
        for item in track([1, 0], "dividing"):
            _ = 1 / item

    with pytest.raises(ZeroDivisionError):
        broken()
    assert sys.stderr is terminal


def test_quiet_without_a_terminal(capsys: pytest.CaptureFixture) -> None:
    assert list(track(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_quiet_without_rich(streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    _, terminal = streams()
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert list(track([1, 2], "counting")) == [1, 2]
    assert terminal.getvalue() == ""


def test_the_corpus_shows_its_progress(streams: Streams, tmp_path: Path) -> None:
    _, terminal = streams()
    source = tmp_path / "source"
    source.mkdir()
    for number in range(80):
        (source / f"{number}.py").write_text("pass\n")
    build_corpus.build_corpus(tmp_path / "out", source)
    assert "train" in terminal.getvalue()
    assert "heldout" in terminal.getvalue()

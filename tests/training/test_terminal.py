"""What is shown on a terminal, and that elsewhere nothing moves and nothing is colored."""

import contextlib
import io
import re

import pytest

from insvp_fast.training import run as run_module
from insvp_fast.training import terminal
from insvp_fast.training.counter import Counter
from insvp_fast.training.run import train
from tests.training.small_runs import quick

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COLORS = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _no_drawings(monkeypatch):
    for name in ("plot_curves", "_plot_prompts"):  # which take longer than the training
        monkeypatch.setattr(run_module, name, lambda *_, **__: None)


@pytest.fixture
def on_terminal(monkeypatch):
    """A context in which both streams are a terminal of 100 columns; it gives what is written there."""
    for name, value in {"TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(terminal, "SECONDS_PER_UPDATE", 0.0)

    @contextlib.contextmanager
    def enter():
        screen = Terminal()
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            yield screen

    return enter


def test_training_shows_a_bar_and_a_table(pictures, tmp_path, on_terminal):
    with on_terminal() as screen:
        train(quick(pictures, tmp_path, epochs=2, batch_size=1))
    shown = screen.getvalue()
    plain = ESCAPES.sub("", shown)
    frames = re.findall(r"epoch 2/2 ━[^\n\r]*", plain)
    facts = re.compile(r" 00:0\d left  loss [\d.]+  val [\d.]+%  \d+ images/s  waiting \d+%")
    assert any(map(facts.search, frames)) and all(len(frame) <= 100 for frame in frames)
    assert "100%" in frames[-1] and COLORS.search(shown)
    assert re.search(r"│ InsVP │ +[\d.]+% │ +[\d,]+ │ epoch \d │\n╰─", plain)
    assert plain.index("run folder") > plain.index("╰─") > plain.rindex("epoch 2/2 ━")  # the bar is gone by then


def test_elsewhere_training_prints_plain_lines(pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # which does not say that a cursor can move
    train(quick(pictures, tmp_path))
    out, err = capsys.readouterr()
    assert "\r" not in out + err and not ESCAPES.search(out + err)
    header = " " * 14 + "test accuracy  trained parameters        kept"
    assert re.search(rf"\n\n{header}\nInsVP {{9,}} [\d.]+% {{9,}}[\d,]+     epoch 1\nprotocol paper", out)


def count():
    with Counter("eval", 40, 8) as counter:
        counter.add(0)
        counter.add(16)
        print("a line meanwhile")
        counter.add(16)


def test_counting_says_what_is_left(on_terminal, monkeypatch):
    with on_terminal() as screen:
        count()
    frames = ESCAPES.sub("", screen.getvalue())
    assert re.search(r"eval [━╸╺]+ +60% 00:00 left  24 of 40 images, [\d,]+ images/s", frames)
    assert "a line meanwhile\n" in frames and "100% 00:00 left  40 of 40 images" in frames
    assert COLORS.search(screen.getvalue())
    monkeypatch.setenv("NO_COLOR", "1")
    with on_terminal() as screen:
        count()
    assert "60%" in screen.getvalue() and not COLORS.search(screen.getvalue())
    monkeypatch.setenv("TERM", "dumb")
    with on_terminal() as screen:
        count()
    assert screen.getvalue() == "a line meanwhile\n"


def test_a_table_elsewhere_has_columns_of_the_given_widths(capsys):
    terminal.print_table(["", "test accuracy", "kept"], [["InsVP", "78.3%", "epoch 2"]], [12, 15, 12])
    assert (
        capsys.readouterr().out == "              test accuracy        kept\nInsVP                 78.3%     epoch 2\n"
    )


def test_markdown_is_set_on_a_terminal_alone(on_terminal):
    text = "| model | test |\n| --- | --- |\n| InsVP | 91.20 |\n"
    with on_terminal() as screen:
        terminal.print_markdown(text)
    assert "InsVP" in screen.getvalue() and "|" not in screen.getvalue()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        terminal.print_markdown(text)
    assert printed.getvalue() == f"{text}\n"

"""What is shown on a terminal, and that elsewhere nothing moves and nothing is colored."""

import contextlib
import io
import re
from types import SimpleNamespace

import pytest

from insvp_fast.training import progress, terminal
from insvp_fast.training import run as run_module
from insvp_fast.training.counter import Counter
from insvp_fast.training.run import train
from insvp_fast.training.run_logger import RunLogger
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


class Batches:
    """Stands in for a loader of 10 batches, in the second epoch from the fifth batch on, which waited for 2 seconds."""

    sampler = SimpleNamespace(epoch=1, first_batch=4)
    timer = SimpleNamespace(reset=lambda: None, seconds=lambda: 2.0)

    def __len__(self):
        return 10


def test_what_is_left_of_a_resumed_training(monkeypatch):
    now, lines = 100.0, []
    monkeypatch.setattr("time.perf_counter", lambda: now)
    monkeypatch.setattr(progress, "SECONDS_PER_LINE", 7.0)
    logger = SimpleNamespace(active=False, say=lines.append)
    with progress.Progress(logger, "epoch 2/3", Batches(), epochs=3) as shown:
        for now in (104.0, 108.0):  # noqa: B007 (the clock reads it)
            shown.count(16)
            shown.show(0.5)
    # of 16 batches, 2 are done in 8 seconds
    assert lines == ["epoch 2/3   60%  loss 0.500  4 images/s  waiting 25%  0:00:56 left"]


def test_scores_beside_a_bar_are_those_of_its_own_training():
    logger, probe = object.__new__(RunLogger), {"model": "linear probe", "epoch": 1, "val_accuracy": 0.5}
    logger.shown, logger.epochs = ["accuracy"], []
    assert logger.scores() == ""
    logger.epochs = [probe]
    assert logger.scores() == ""
    logger.epochs = [probe, {"model": "InsVP", "epoch": 1, "val_accuracy": 0.25, "images_per_s": 9.0}]
    assert logger.scores() == "val 25.0%"


def count():
    with Counter("eval", 40, 8) as counter:
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

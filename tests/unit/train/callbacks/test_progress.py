"""What a run shows, as a terminal's screen and as lines of a file."""

import io
from types import SimpleNamespace

import pyte
from rich.console import Console

from stellarbyte.train.callbacks.progress import ProgressBar


def show(console: Console, *, rank_is_first: bool = True) -> None:
    """20 steps with two evaluations."""
    bar = ProgressBar(console, batch_tokens=1000, flops_per_token=1e6, peak_flops=1e12)
    state = SimpleNamespace(is_world_process_zero=rank_is_first, global_step=0, max_steps=20)
    bar.on_train_begin(None, state, None)
    for step in range(1, 21):
        state.global_step = step
        bar.on_log(None, state, None, logs={"loss": 5 - step / 10, "learning_rate": 1e-3})
        if step % 10 == 0:
            metrics = {"eval_loss": 4.0 + step / 100, "eval_perplexity": 60.0, "eval_tokens": 1234.0}
            bar.on_evaluate(None, state, None, metrics=metrics)
    bar.on_train_end(None, state, None)


def test_the_screen_has_a_bar_and_a_table() -> None:
    written = io.StringIO()
    show(Console(file=written, force_terminal=True, width=110, height=40))
    screen = pyte.Screen(110, 40)
    pyte.Stream(screen).feed(written.getvalue().replace("\n", "\r\n"))
    lines = [line.rstrip() for line in screen.display]
    table = [line for line in lines if "│" in line]
    assert any("4.1000" in line and "best" in line and "1,234" in line for line in table)
    assert any("4.2000" in line and "best" not in line for line in table)
    (bar,) = [line for line in lines if "20/20" in line]
    assert "loss 3.0000" in bar and "lr 1.00e-03" in bar and "tokens/s" in bar and "MFU" in bar


def test_a_file_gets_a_line_now_and_then_and_other_ranks_show_nothing() -> None:
    written = io.StringIO()
    show(Console(file=written, width=110))
    lines = [line for line in written.getvalue().splitlines() if line.startswith("step ")]
    assert len(lines) == 20 and lines[-1].startswith("step 20/20  loss 3.0000")
    silent = io.StringIO()
    show(Console(file=silent, width=110), rank_is_first=False)
    assert silent.getvalue() == ""

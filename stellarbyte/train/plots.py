"""Pictures of a run: its losses and its learning rate by step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stellarbyte.train.errors import missing_library

LOSS_PICTURE, RATE_PICTURE = "loss.png", "learning-rate.png"


def draw_run(log_history: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Write the pictures into the folder and return their paths.

    Raises:
        TrainError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no window system is asked
    except ImportError as error:
        raise missing_library("matplotlib", "run.plots") from error
    curves = {
        LOSS_PICTURE: [("training", "loss"), ("held out", "eval_loss")],
        RATE_PICTURE: [("learning rate", "learning_rate")],
    }
    files = []
    for name, lines in curves.items():
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel="nats per token" if name == LOSS_PICTURE else "learning rate")
        for label, key in lines:
            points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 3 else None)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        files.append(folder / name)
        figure.savefig(files[-1], dpi=120)
    return files

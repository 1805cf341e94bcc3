"""A curve of losses in text."""

import math
from collections.abc import Sequence

Point = tuple[float, float]  # step, loss
TRAIN, VALID = "·", "●"


def loss_plot(train: Sequence[Point], valid: Sequence[Point], width: int, height: int) -> list[str]:
    """Lines of `width` characters at most: losses upwards, steps to the right; [] without a finite loss.

    A column shows the mean of the training losses of its steps, and the last validation loss over them.
    """
    series = [[(step, loss) for step, loss in points if math.isfinite(loss)] for points in (train, valid)]
    losses = [loss for points in series for _, loss in points]
    if not losses or height < 2:
        return []
    low, high = min(losses), max(losses)
    labels = [f"{high:.2f}", *[""] * (height - 2), f"{low:.2f}"]
    margin = max(map(len, labels))
    columns = max(1, width - margin - 2)
    last = max(step for points in series for step, _ in points)
    first = min(step for points in series for step, _ in points)

    def column(step: float) -> int:
        return 0 if last == first else round((step - first) / (last - first) * (columns - 1))

    def row(loss: float) -> int:
        return 0 if high == low else round((high - loss) / (high - low) * (height - 1))

    rows = [[" "] * columns for _ in range(height)]
    by_column: dict[int, list[float]] = {}
    for step, loss in series[0]:
        by_column.setdefault(column(step), []).append(loss)
    for place, found in by_column.items():
        rows[row(sum(found) / len(found))][place] = TRAIN
    for step, loss in series[1]:
        rows[row(loss)][column(step)] = VALID
    return [f"{label:>{margin}} ┤{''.join(cells).rstrip()}" for label, cells in zip(labels, rows, strict=True)]

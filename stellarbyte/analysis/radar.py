"""Four figures of a model on scales from 0 to 1, where 1 is the smallest, fastest or best."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Scale:
    """From the value that scores 0 to the one that scores 1; what is beyond scores as the end."""

    worst: float
    best: float
    kind: Literal["log", "linear"]

    def score(self, value: float) -> float:
        """Linear in the value, or in its logarithm."""
        if self.kind == "linear":
            position = (value - self.worst) / (self.best - self.worst)
        elif value <= 0:
            position = 0.0 if self.worst < self.best else 1.0
        else:
            position = math.log(value / self.worst) / math.log(self.best / self.worst)
        return min(1.0, max(0.0, position))


SCALES = {
    "size": Scale(worst=1e12, best=1e6, kind="log"),  # parameters
    "speed": Scale(worst=1.0, best=1e4, kind="log"),  # decoded tokens/s of one sequence
    "memory": Scale(worst=2.0**40, best=2.0**20, kind="log"),  # bytes: weights and the cache of one full sequence
    "quality": Scale(worst=4.0, best=0.5, kind="linear"),  # bits per byte
}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Attributes: score: 0 to 1; worst, best, kind: its scale."""

    name: str
    value: float
    score: float
    worst: float
    best: float
    kind: Literal["log", "linear"]


def radar_axes(values: dict[str, float | None]) -> list[Axis]:
    """Of the values that are known, by the names in SCALES, in their order."""
    axes = []
    for name, scale in SCALES.items():
        value = values[name]
        if value is not None:
            axes.append(
                Axis(
                    name=name,
                    value=value,
                    score=scale.score(value),
                    worst=scale.worst,
                    best=scale.best,
                    kind=scale.kind,
                )
            )
    return axes

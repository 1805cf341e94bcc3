"""Histograms in Prometheus' form, cheap to update and serialisable."""

from bisect import bisect_left

import msgspec

# vLLM's bounds, for its dashboards; some start lower, since steps of small models are short.
FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
BETWEEN_TOKENS_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0),
    *(1920.0, 7680.0),
)
QUEUE_S = (0.001, 0.005, 0.01, 0.05, 0.1, *REQUEST_S)
REQUEST_TOKENS = tuple(float(digit * 10**power) for power in range(7) for digit in (1, 2, 5))
CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0)
PREEMPTIONS = (0.0, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)
STEP_TOKENS = (1.0, *(float(2**power) for power in range(3, 15)))
# Ours.
STEP_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
LAG_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Buckets(msgspec.Struct, frozen=True, kw_only=True):
    """A histogram's counts; one more entry than `bounds`, for values above all of them."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float = 0.0  # the sum of the values

    @property
    def num_values(self) -> int:
        return sum(self.counts)


class Histogram:
    """Counts values by the smallest of the ascending `bounds` that is ≥ the value. One thread."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def add(self, buckets: Buckets) -> None:
        """Add another histogram's counts; ValueError if its bounds differ."""
        if buckets.bounds != self._bounds or len(buckets.counts) != len(self._counts):
            raise ValueError("the histograms have different bounds")
        self._counts = [ours + theirs for ours, theirs in zip(self._counts, buckets.counts, strict=True)]
        self._total += buckets.total

    def snapshot(self) -> Buckets:
        return Buckets(bounds=self._bounds, counts=tuple(self._counts), total=self._total)

    def take(self) -> Buckets:
        """The counts since the last call."""
        taken = self.snapshot()
        self._counts = [0] * len(self._counts)
        self._total = 0.0
        return taken

"""When a draft is worth its time: what a token more costs a step, and how often a source's guesses are right."""

import math

_KEEPS = 0.98  # weight of a step in the next one's estimate
_SHARE_AT_FIRST = 0.2  # of a step of one token that grows with its tokens, until steps were measured
_WEIGHT_AT_FIRST = 4.0  # of that, as the variance of tokens
_OUTLIER = 3.0  # longer steps than this many times the expected count as that
_LEARNS = 0.12  # share of a new token in the average
MOST_CERTAIN = 0.98


class StepCosts:
    """The duration of a step of T tokens as a + b T, by least squares over recent steps."""

    def __init__(self) -> None:
        self._weight = self._tokens = self._seconds = self._squares = self._products = 0.0

    def note(self, num_tokens: int, seconds: float) -> None:
        """A step without prompts."""
        if self._weight > 1 and self._seconds:
            start, slope = self._line()
            seconds = min(seconds, _OUTLIER * (start + slope * num_tokens))
        self._weight = _KEEPS * self._weight + 1
        self._tokens = _KEEPS * self._tokens + num_tokens
        self._seconds = _KEEPS * self._seconds + seconds
        self._squares = _KEEPS * self._squares + num_tokens * num_tokens
        self._products = _KEEPS * self._products + num_tokens * seconds

    def token_cost(self, num_rows: int) -> float:
        """What one token more costs a step of `num_rows` sequences, in the time that it takes for each of these."""
        if not self._seconds:
            start, slope = 1 - _SHARE_AT_FIRST, _SHARE_AT_FIRST
        else:
            start, slope = self._line()
        return slope * num_rows / (start + slope * num_rows)

    def duration(self, num_tokens: int) -> float:
        """Expected duration of a step in seconds; 0: unknown."""
        if not self._seconds:
            return 0.0
        start, slope = self._line()
        return start + slope * num_tokens

    def cost_of(self, seconds: float, num_rows: int) -> float:
        """What so many seconds more cost, in the same unit; 0 until steps were measured."""
        if not self._seconds:
            return 0.0
        start, slope = self._line()
        return seconds * num_rows / (start + slope * num_rows)

    @property
    def step_s(self) -> float:
        """Average duration of recent steps; 0: unknown."""
        return self._seconds / self._weight if self._weight else 0.0

    def _line(self) -> tuple[float, float]:
        """a and b, both at least a little above 0."""
        mean, mean_s = self._tokens / self._weight, self._seconds / self._weight
        variance = max(0.0, self._squares / self._weight - mean * mean)
        covariance = self._products / self._weight - mean * mean_s
        expected = mean_s * _SHARE_AT_FIRST / (1 - _SHARE_AT_FIRST + _SHARE_AT_FIRST * mean)
        prior = _WEIGHT_AT_FIRST / self._weight
        slope = (covariance + prior * expected) / (variance + prior)
        slope = min(max(slope, 0.02 * mean_s / mean), mean_s / mean)
        return max(0.0, mean_s - slope * mean), slope


class Acceptance:
    """How likely a source's next token is right, by those so far: an exponential average."""

    def __init__(self, at_first: float) -> None:
        self.chance = at_first

    def note(self, num_drafted: int, num_accepted: int) -> None:
        """A verified draft. Tokens after the first wrong one say nothing."""
        for is_right in [True] * num_accepted + [False] * (num_accepted < num_drafted):
            self.chance += _LEARNS * (is_right - self.chance)

    def best_length(self, token_cost: float) -> int:
        """The most tokens of which each is right with at least the chance that its cost asks for."""
        if self.chance < token_cost:
            return 0
        chance = min(self.chance, MOST_CERTAIN)
        return max(1, int(math.log(max(token_cost, 1e-6)) / math.log(chance)))

"""When a draft is worth waiting for: on a device that runs a step ahead, the host must know the newest token first."""

from stellarbyte_server.engine.drafts.drafter import Drafter
from stellarbyte_server.engine.drafts.worth import StepCosts

MOST_ROWS = 16  # sequences that run together with drafts: with more, waiting costs more than drafts can save
_LOST_AT_FIRST = 0.25  # of a step's time, until it was measured
_PLAIN_STEPS = 8  # measured before anything waits
_TRIED_EVERY = 16  # steps, while drafts are not worth waiting for
_PLAIN_EVERY = 100  # steps, so that both durations stay known
_OUTLIER = 3.0  # times the duration of a step ahead: kernels are being compiled
_MOST_OUTLIERS = 4


class Overlap:
    """The durations of steps that were started before the one before was read, and of those with drafts, which were
    not. Their difference is what waiting costs."""

    def __init__(self) -> None:
        self.waited = StepCosts()
        self._ahead = StepCosts()
        self._num_ahead = 0  # since the start
        self._num_outliers = 0
        self._num_since_wait = _TRIED_EVERY
        self._num_waits = 0  # without a step ahead between them

    @property
    def step_s(self) -> float:
        """Average duration of recent steps without prompts; 0: unknown."""
        return self._ahead.step_s

    def note_ahead(self, num_tokens: int, seconds: float) -> None:
        """A step without drafts or prompts, started while the one before ran: the time between the two results."""
        self._ahead.note(num_tokens, seconds)
        self._num_ahead += 1

    def note_waited(self, num_tokens: int, seconds: float) -> None:
        """A step with drafts: the time since the result of the step before."""
        if seconds > _OUTLIER * self._ahead.duration(num_tokens) and self._num_outliers < _MOST_OUTLIERS:
            self._num_outliers += 1
            return
        self.waited.note(num_tokens, seconds)

    def wait_cost(self, num_rows: int) -> float:
        """What waiting costs a step of so many sequences, in steps of one of them."""
        ahead_s = self._ahead.duration(num_rows)
        if not ahead_s or not self.waited.step_s:
            return _LOST_AT_FIRST * num_rows
        return max(0.0, self.waited.duration(num_rows) / ahead_s - 1) * num_rows

    def waits(self, drafters: list[tuple[Drafter, int]], num_rows: int) -> bool:
        """Whether to wait for the newest tokens of `num_rows` sequences; those that it is for pay for all.

        `drafters`: of the sequences that may have a draft, and their numbers of tokens.
        """
        self._num_since_wait += 1
        payers = self._payers(drafters, num_rows) if self._num_ahead >= _PLAIN_STEPS and num_rows <= MOST_ROWS else []
        if not payers or self._num_waits >= _PLAIN_EVERY:
            self._num_waits = 0
            return False
        share = self.wait_cost(num_rows) / len(payers)
        for drafter in payers:
            drafter.pay(share)
        self._num_since_wait = 0
        self._num_waits += 1
        return True

    def _payers(self, drafters: list[tuple[Drafter, int]], num_rows: int) -> list[Drafter]:
        """Those for which waiting is likely to pay off, or to be tried again; [] if they cannot pay for it."""
        cost = self.wait_cost(num_rows)
        hopeful = [each for each in drafters if each[0].gain >= cost / num_rows]
        if sum([drafter.gain for drafter, _ in hopeful]) < cost:
            hopeful = drafters if self._num_since_wait >= _TRIED_EVERY else []
        for _ in range(2):  # where some cannot pay their part, the others may pay for them
            share = cost / max(1, len(hopeful))
            able = [(drafter, num_tokens) for drafter, num_tokens in hopeful if drafter.can_pay(share, num_tokens)]
            if len(able) == len(hopeful):
                return [drafter for drafter, _ in able]
            hopeful = able
        return []

"""When a draft is worth waiting for: on a device that runs a step ahead, the host must know the newest token first."""

from stellarbyte_server.engine.drafts.drafter import Drafter
from stellarbyte_server.engine.drafts.worth import StepCosts

MOST_ROWS = 16  # sequences that run together with drafts: with more, waiting costs more than drafts can save
_LOST_AT_FIRST = 0.1  # of a step's time, until it was measured
_AHEAD_AT_FIRST = 8  # steps that are measured before anything waits
_TRIED_EVERY = 16  # steps, while drafts are not worth waiting for
_AHEAD_EVERY = 100  # steps, so that both durations stay known
_LEAST_GUESSES = 2  # that a request can pay when it is waited for
_OUTLIER = 3.0  # times the duration of a step ahead: kernels are being compiled
_MOST_OUTLIERS = 4


class Overlap:
    """The durations of steps that were started before the one before was read, and of those that were not, as all with
    drafts. Their difference is what a delay costs. There is one before a step for whose drafts the newest tokens must
    be known, and one after each step with drafts."""

    def __init__(self) -> None:
        self.waited = StepCosts()
        self._ahead = StepCosts()
        self._num_ahead = 0  # since the start
        self._num_outliers = 0
        self._num_since_wait = _TRIED_EVERY
        self._num_waits = 0  # without a step ahead between them
        self._payers: list[Drafter] = []  # for the last wait
        self._share = 0.0  # of each, for one delay

    @property
    def step_s(self) -> float:
        """Average duration of recent steps without prompts; 0: unknown."""
        return self._ahead.step_s

    def note_ahead(self, num_tokens: int, seconds: float) -> None:
        """A step without drafts or prompts, started while the one before ran: the time between the two results."""
        self._ahead.note(num_tokens, seconds)
        self._num_ahead += 1

    def note_waited(self, num_tokens: int, seconds: float) -> None:
        """A step without prompts that was started after the one before was read: the time between the two results."""
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

    def waits(self, drafters: list[tuple[Drafter, int]], num_rows: int, *, is_ahead: bool) -> bool:
        """Whether to propose drafts for a step of `num_rows` sequences.

        Args:
            drafters: of the sequences that may have a draft, and their numbers of tokens.
            is_ahead: a step is in flight, which has to be read before; this delays the next one.
        """
        self._num_since_wait += 1
        self._payers = []
        if self._num_ahead < _AHEAD_AT_FIRST or num_rows > MOST_ROWS or self._num_waits >= _AHEAD_EVERY:
            self._num_waits = 0
            return False
        cost = self.wait_cost(num_rows)
        guesses_cost = _LEAST_GUESSES * self.waited.token_cost(num_rows)
        self._payers = self._who_pays(drafters, cost * (2 if is_ahead else 1), guesses_cost)
        if not self._payers:
            self._num_waits = 0
            return False
        self._share = cost / len(self._payers)
        self._num_since_wait = 0
        self._num_waits += 1
        if is_ahead:
            self.pay()
        return True

    def pay(self) -> None:
        """Let those that the last wait is for pay for the delay of one step."""
        for drafter in self._payers:
            drafter.pay(self._share)

    def _who_pays(self, drafters: list[tuple[Drafter, int]], cost: float, guesses_cost: float) -> list[Drafter]:
        """Those for which waiting is likely to pay off, or to be tried again; [] if they cannot pay for the delays, and
        then for a few guesses each."""
        hopeful = [each for each in drafters if each[0].gain * len(drafters) >= cost]
        if sum([drafter.gain for drafter, _ in hopeful]) < cost:
            hopeful = drafters if self._num_since_wait >= _TRIED_EVERY else []
        for _ in range(2):  # where some cannot pay their part, the others may pay for them
            share = cost / max(1, len(hopeful)) + guesses_cost
            able = [(drafter, num_tokens) for drafter, num_tokens in hopeful if drafter.can_pay(share, num_tokens)]
            if len(able) == len(hopeful):
                return [drafter for drafter, _ in able]
            hopeful = able
        return []

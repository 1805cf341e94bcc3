"""Waiting for the newest tokens, so that drafts can follow them, costs little where drafts are of no use."""

import random
from typing import Any

import pytest

from stellarbyte_server.engine.adapters.absent import no_adapters
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.drafts.drafts import Drafts
from stellarbyte_server.engine.run.step_plan import StepResult
from stellarbyte_server.engine.state.sequence import Chunk
from tests.support.engines.drafting import GRAMMARS, TOKENIZER
from tests.support.engines.engine import make_request, make_scheduler

NUM_TOKENS = 600
GPU_S, TOKEN_S = 1.0, 0.01  # of a step, and of each of its tokens


class SimulatedStep:
    def __init__(self, card: "SimulatedCard", tokens: list[list[int]], done_s: float) -> None:
        self._card, self._tokens, self._done_s = card, tokens, done_s

    def finish(self) -> None:
        pass

    def result(self) -> StepResult:
        self._card.now_s = max(self._card.now_s, self._done_s)
        return StepResult(tokens=self._tokens)


class SimulatedCard:
    """A device that computes one step after another, and a host that takes `host_s` for each. Texts repeat after
    `period` letters."""

    num_steps_ahead = 1

    def __init__(self, host_s: float, period: int, first_s: float = 0.0) -> None:
        """`first_s`: what the first step with drafts takes longer, for instance to compile kernels."""
        self.now_s = 0.0
        self.num_waited = 0
        self._host_s, self._first_s = host_s, first_s
        self._free_s = 0.0
        self._text = random.Random(1).choices(range(97, 123), k=period)

    def prepare(self) -> bool:
        return False

    def start(self, chunks: list[Chunk]) -> SimulatedStep:
        self.now_s += self._host_s
        duration_s = GPU_S + TOKEN_S * sum([chunk.length for chunk in chunks])
        if any([chunk.draft for chunk in chunks]):
            self.num_waited += 1
            duration_s, self._first_s = duration_s + self._first_s, 0.0
        self._free_s = max(self.now_s, self._free_s) + duration_s
        return SimulatedStep(self, [self._sampled(chunk) for chunk in chunks], self._free_s)

    def _sampled(self, chunk: Chunk) -> list[int]:
        if not chunk.samples:
            return []
        tokens: list[int] = []
        first = chunk.start + chunk.length - len(chunk.draft) + 7 * int(chunk.sequence.request.request_id)
        for place, guess in enumerate([*chunk.draft, None]):
            tokens.append(self._text[(first + place) % len(self._text)])
            if tokens[-1] != guess:
                break
        return tokens


def time_of(card: SimulatedCard, num_streams: int, *, has_drafts: bool) -> float:
    """Seconds until all streams have ended."""
    drafts = Drafts(clock=lambda: card.now_s, runs_ahead=True) if has_drafts else None
    scheduler = make_scheduler(num_steps_ahead=1, num_blocks=8000, max_num_seqs=32, clock=lambda: card.now_s)
    core = EngineCore(scheduler, card, TOKENIZER, frozenset(), no_adapters(), GRAMMARS, drafts=drafts)
    for number in range(num_streams):
        core.submit(make_request([97, 98], NUM_TOKENS, str(number)))
    while core.has_work:
        core.step()
    assert core.stats().generation_tokens_total == num_streams * NUM_TOKENS
    return card.now_s


@pytest.mark.parametrize("num_streams", [1, 4, 16, 17])
@pytest.mark.parametrize("host_s", [0.1, 0.4, 0.9])
def test_text_that_repeats_nothing_takes_at_most_3_percent_longer(host_s: float, num_streams: int) -> None:
    card = SimulatedCard(host_s, 10**4)
    without = time_of(SimulatedCard(host_s, 10**4), num_streams, has_drafts=False)
    assert time_of(card, num_streams, has_drafts=True) <= 1.03 * without + 1
    if num_streams > 16:
        assert card.num_waited == 0
    elif host_s == 0.1:
        assert card.num_waited > 0


@pytest.mark.parametrize(("num_streams", "share"), [(1, 0.4), (4, 0.45), (16, 0.7)])
@pytest.mark.parametrize("host_s", [0.1, 0.4])
@pytest.mark.parametrize("first_s", [0.0, 50.0])
def test_text_that_repeats_itself_takes_much_shorter(
    host_s: float, num_streams: int, share: float, first_s: float
) -> None:
    options: dict[str, Any] = {"host_s": host_s, "period": 100}
    without = time_of(SimulatedCard(**options), num_streams, has_drafts=False)
    card = SimulatedCard(**options, first_s=first_s)
    assert time_of(card, num_streams, has_drafts=True) < share * without + first_s


def test_where_a_step_with_drafts_takes_longer_than_it_saves_they_are_given_up() -> None:
    """A host that is slower than the card: the time of both adds up."""
    card = SimulatedCard(30.0, 10**4)
    without = time_of(SimulatedCard(30.0, 10**4), 1, has_drafts=False)
    assert time_of(card, 1, has_drafts=True) <= 1.03 * without

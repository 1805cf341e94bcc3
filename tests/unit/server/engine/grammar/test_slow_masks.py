"""Masks that take long hold up their own request only, whether steps run one by one or one ahead."""

import json
import threading
import time
from functools import partial
from typing import Any

import jsonschema
import pytest

from stellarbyte.backends.torch_model import TorchModel
from stellarbyte_server.api.structured.grammars import json_grammar
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.grammar.mask_workers import QUICK_MASK_S, QUICK_MASKS_S, MaskWorkers
from stellarbyte_server.engine.grammar.token_grammar import TokenGrammar
from stellarbyte_server.protocol.messages import Delta
from tests.support.engines.drafting import compiled
from tests.support.engines.engine import Ahead, make_request
from tests.support.engines.engine_core import VOCABULARY, drain, ended, model_core, text_of
from tests.support.models.byte_transformer import make_model
from tests.support.schemas import SCHEMAS
from tests.support.tools.readable import readable


class SlowMasks:
    """Lets every mask but a grammar's first wait until `go_on` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on = threading.Event()
        self.threads: list[threading.Thread] = []
        compute, begin = TokenGrammar._compute, TokenGrammar.begin_mask

        def slow(grammar: TokenGrammar) -> None:
            self.threads.append(threading.current_thread())
            self.go_on.wait(20)
            compute(grammar)

        def expected(grammar: TokenGrammar) -> None:
            grammar.expected_s = 1.0
            begin(grammar)

        monkeypatch.setattr(TokenGrammar, "_compute", slow)
        monkeypatch.setattr(TokenGrammar, "begin_mask", expected)


def make_core(num_steps_ahead: int, **options: Any) -> EngineCore:
    model = make_model(vocab_size=VOCABULARY)
    core = model_core(model, TorchModel, num_steps_ahead=num_steps_ahead, **options)
    if num_steps_ahead:
        core.runner = Ahead(core.runner)
    return core


@pytest.mark.parametrize("num_steps_ahead", [0, 1])
def test_others_go_on_while_a_mask_is_computed(monkeypatch: pytest.MonkeyPatch, num_steps_ahead: int) -> None:
    masks, core = SlowMasks(monkeypatch), make_core(num_steps_ahead)
    held = make_request([1, 2, 3], 40, "held", seed=1, temperature=1.5, grammar=json_grammar(SCHEMAS[1]))
    core.submit(held)
    items: list[Any] = []
    while not any(isinstance(item, Delta) for item in items):
        core.take_replies()
        items += core.step() if core.has_work else []
        time.sleep(0.001)
    plain = drain(core, make_request([4, 5], 30, "plain", ignore_eos=True), limit_s=10)
    items += plain.pop("held", [])
    assert plain["plain"][-1].num_tokens and not ended(items[-1])
    num_known = len(compiled(held.sampling.grammar or "").forced())  # they take no further mask
    assert sum(item.num_tokens for item in items if isinstance(item, Delta)) <= num_known + 1
    masks.go_on.set()
    while not ended(items[-1]):
        items += core.step()
    jsonschema.validate(json.loads(text_of(items)), SCHEMAS[1])
    assert threading.current_thread() not in masks.threads
    assert core.scheduler.pool.num_used == 0


def test_an_engine_that_waits_for_a_mask_alone_sleeps_until_it_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, core = SlowMasks(monkeypatch), make_core(0)
    core.submit(make_request([1, 2, 3], 40, "r", seed=1, temperature=1.5, grammar=json_grammar(SCHEMAS[1])))
    while not (core.has_work and core.is_blocked):
        core.take_replies()
        core.step()
        time.sleep(0.001)
    is_ready = partial(readable, list(core.wake_fds))
    core.step()
    assert not is_ready(0.05)
    masks.go_on.set()
    assert is_ready(10)
    assert any(isinstance(item, Delta) for item in core.step())


def test_quick_masks_that_are_left_to_the_engines_thread_are_bounded_together() -> None:
    workers = MaskWorkers(lambda: None)
    for _ in range(3):
        workers.begin_step(0.0)
        left = [expected_s for expected_s in [QUICK_MASK_S * 0.9] * 300 if workers.may_leave(expected_s)]
        assert 0 < sum(left) <= QUICK_MASKS_S
    assert not workers.may_leave(QUICK_MASK_S * 1.1)
    workers.close()


@pytest.mark.parametrize("num_steps_ahead", [0, 1])
def test_answers_are_the_same_whoever_computes_their_masks(
    monkeypatch: pytest.MonkeyPatch, num_steps_ahead: int
) -> None:
    """Also where sequences are preempted meanwhile."""
    requests = [
        make_request([i, 2, 3], 60, str(i), seed=i, temperature=1.5, grammar=json_grammar(SCHEMAS[i % 3]))
        for i in range(9)
    ]
    # Two of these do not fit together, however long the masks of the others take.
    requests += [make_request([i, 7], 30, str(i), ignore_eos=True) for i in range(9, 12)]
    quick = drain(make_core(num_steps_ahead), *requests)
    SlowMasks(monkeypatch).go_on.set()
    core = make_core(num_steps_ahead, num_blocks=12)
    slow = drain(core, *requests)
    assert core.stats().num_preemptions_total > 0
    assert [text_of(slow[str(i)]) for i in range(12)] == [text_of(quick[str(i)]) for i in range(12)]

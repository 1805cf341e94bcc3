"""What the engine says of every request, step by step, with tokens from a script instead of a model."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from stellarbyte_server.engine.adapters.absent import no_adapters
from stellarbyte_server.engine.adapters.folder import AdapterFolder
from stellarbyte_server.engine.adapters.registry import Adapters
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.grammar.compiler import GrammarCompiler
from stellarbyte_server.engine.run.step_plan import StepResult
from stellarbyte_server.engine.state.sequence import Chunk, Sequence
from stellarbyte_server.protocol.messages import FAILED, Accepted, Delta, Rejected, merged
from tests.support.engines.engine import ComputedStep, make_request, make_scheduler
from tests.support.models.adapters import FakeStore, listed, touch_adapter
from tests.support.servers.fake_engine import make_tokenizer


class ScriptedRunner:
    """Every sampled token is an "a"."""

    num_steps_ahead = 0

    def recover(self, sequences: Iterable[Sequence]) -> None:
        pass

    def prepare(self) -> bool:
        return False

    def start(self, chunks: list[Chunk]) -> ComputedStep:
        return ComputedStep(StepResult(tokens=[[ord("a")] * chunk.samples for chunk in chunks]))


def make_core(adapters: Adapters | None = None, **options) -> EngineCore:
    adapters = no_adapters() if adapters is None else adapters
    tokenizer, end = make_tokenizer(), frozenset[int]()
    grammars = GrammarCompiler(tokenizer, end, tokenizer.get_vocab_size())
    scheduler = make_scheduler(adapters=adapters, **options)
    return EngineCore(scheduler, ScriptedRunner(), tokenizer, end, adapters, grammars)


def news_of(core: EngineCore) -> dict[str, list]:
    """Everything said until no work is left, by request."""
    news: dict[str, list] = {}
    while core.has_work:
        for item in core.step():
            news.setdefault(item.request_id, []).append(item)
    return news


def test_a_request_is_accepted_before_its_first_token_and_ends_once() -> None:
    core = make_core(max_num_seqs=2, max_num_batched_tokens=7)
    for i in range(5):
        core.submit(make_request([i] * 10, max_tokens=3, request_id=str(i)))
    news = news_of(core)
    assert news.keys() == set("01234")
    for accepted, *deltas in news.values():
        assert isinstance(accepted, Accepted)
        assert [delta.finish_reason for delta in deltas] == [None, None, "length"]
        assert "".join(delta.text for delta in deltas) == "aaa"


def test_tokens_of_steps_are_those_of_prompts_and_of_answers_but_the_last() -> None:
    core = make_core(max_num_seqs=3, max_num_batched_tokens=7)
    for i in range(5):
        core.submit(make_request([i] * (10 + i), max_tokens=3, request_id=str(i)))
    news_of(core)
    stats = core.stats()
    assert stats.step_tokens_total == sum(10 + i + 3 - 1 for i in range(5))
    assert stats.num_steps_total >= stats.step_tokens_total / 7


class Drafting(ScriptedRunner):
    """Rows that sample get the next three letters at once."""

    def start(self, chunks: list[Chunk]) -> ComputedStep:
        letters = [ord("a") + i for i in range(26)]
        numbers = [chunk.sequence.num_generated for chunk in chunks]
        return ComputedStep(
            StepResult(tokens=[letters[i : i + 3] * chunk.samples for i, chunk in zip(numbers, chunks, strict=True)])
        )


def test_rows_that_get_several_tokens_a_step_end_where_they_would_with_one() -> None:
    core = make_core()
    core.runner = Drafting()
    core.submit(make_request([1] * 5, 7, "length", return_token_ids=True))
    core.submit(make_request([2] * 5, 9, "stop", stop=("e",)))
    core.submit(make_request([3] * 5, 9, "token", stop_token_ids=(ord("h"),), min_tokens=2))
    news = news_of(core)
    assert [delta.num_tokens for delta in news["length"][1:]] == [3, 3, 1]
    answers = {name: merged(deltas[1:]) for name, deltas in news.items()}
    found = {name: (d.text, d.num_tokens, d.finish_reason) for name, d in answers.items()}
    assert found == {
        "length": ("abcdefg", 7, "length"), "stop": ("abcd", 5, "stop"), "token": ("abcdefg", 8, "stop"),
    }  # fmt: skip
    assert answers["length"].token_ids == tuple(b"abcdefg")
    assert core.stats().generation_tokens_total == 7 + 5 + 8 and core.stats().num_blocks_used == 0


def test_a_request_that_may_not_wait_runs_at_once_or_is_rejected() -> None:
    core = make_core(max_num_seqs=1, queue_timeout_s=0)
    for name in ("first", "second"):
        core.submit(make_request([1], max_tokens=2, request_id=name))
    news = news_of(core)
    assert [type(item) for item in news["first"]] == [Accepted, Delta, Delta]
    (rejected,) = news["second"]
    assert isinstance(rejected, Rejected) and rejected.code == "queue_timeout"


def test_the_last_delta_tells_what_was_cached_and_what_was_evicted() -> None:
    core = make_core(window=8, sink_tokens=4, max_model_len=12)
    prompt = [1] * 21
    told = []
    for name in ("cold", "warm"):
        core.submit(make_request(prompt, max_tokens=3, request_id=name, context_overflow="slide"))
        last = news_of(core)[name][-1]
        told.append((last.cached_tokens, last.evicted_tokens))
    assert told == [(0, 24 - 12), (20, 24 - 12)]
    stats = core.stats()
    assert (stats.prefix_cache_queries_total, stats.prefix_cache_hits_total) == (42, 20)
    assert (stats.evicted_tokens_total, stats.prompt_tokens_total, stats.generation_tokens_total) == (24, 42, 6)


def test_evicted_tokens_of_a_running_stream_are_counted_block_by_block() -> None:
    core = make_core(window=8, sink_tokens=4, max_model_len=12, block_size=4)
    core.submit(make_request([1] * 10, max_tokens=100, context_overflow="slide"))
    for _ in range(60):
        core.step()
    assert 60 + 10 - 12 - 4 <= core.stats().evicted_tokens_total <= 60 + 10 - 12


def test_the_engine_rests_only_while_all_there_is_waits_for_an_adapter(tmp_path: Path) -> None:
    """After the last token of a slot's only request it rested for a second, though the next could have the slot."""
    for name in "ab":
        touch_adapter(tmp_path / name)
    adapters = Adapters(AdapterFolder(str(tmp_path), {}), FakeStore(), num_slots=1, max_in_memory=3)
    core = make_core(adapters)
    core.submit(make_request([1] * 5, 3, "first", adapter="a"))
    core.submit(make_request([1] * 5, 3, "second", adapter="b"))
    assert core.step() == [] and core.is_blocked  # both are being read
    rested = []
    finished: list[str] = []
    for _ in range(20):
        news = core.step()
        finished += [item.request_id for item in news if isinstance(item, Delta) and item.finish_reason]
        if finished == ["first"]:
            rested.append(core.is_blocked)
    assert finished == ["first", "second"]
    assert rested[0] is False


def test_requests_that_wait_for_an_adapter_that_cannot_be_read_are_rejected(tmp_path: Path) -> None:
    touch_adapter(tmp_path / "a")
    store = FakeStore(errors={"a": "The adapter 'a' cannot be loaded: it is broken."})
    adapters = Adapters(AdapterFolder(str(tmp_path), {}), store, num_slots=1, max_in_memory=3)
    core = make_core(adapters)
    core.submit(make_request([1] * 5, 3, "r", adapter="a"))
    core.step()
    assert core.step() == [Rejected("r", store.errors["a"], "adapter_failed", "model")]
    assert not core.has_work and not [c for c in listed(adapters) if c.num_waiting]


def test_a_request_with_a_grammar_that_cannot_be_queued_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    core = make_core()
    add = core.scheduler.add

    def faulty_add(request, *rest):
        if request.request_id == "bad":
            raise KeyError
        return add(request, *rest)

    monkeypatch.setattr(core.scheduler, "add", faulty_add)
    for name in ("bad", "good"):
        core.submit(make_request([1], 3, name, grammar='start: "aaaaa"'))
    news: list = []
    while not any(getattr(item, "finish_reason", None) and item.request_id == "good" for item in news):
        core.take_replies()
        news += core.step()
    assert [item.error for item in news if item.request_id == "bad"] == [FAILED]
    assert core.scheduler._num_reserved == 0


def test_an_adapter_whose_copy_to_a_slot_fails_is_the_servers_fault_and_its_slot_is_used_again(tmp_path: Path) -> None:
    touch_adapter(tmp_path / "a")
    touch_adapter(tmp_path / "b")
    store = FakeStore(fill_errors={"a": "The adapter 'a' could not be made ready."})
    core = make_core(Adapters(AdapterFolder(str(tmp_path), {}), store, num_slots=1, max_in_memory=3))
    core.submit(make_request([1] * 5, 3, "failing", adapter="a"))
    core.submit(make_request([1] * 5, 3, "other", adapter="b"))
    news = news_of(core)
    assert news["failing"] == [Rejected("failing", store.fill_errors["a"], "internal_error", "model")]
    assert news["other"][-1].finish_reason == "length"

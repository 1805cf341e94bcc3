"""An engine core without a model that checks every chunk, whose tokens follow from its requests alone."""

from collections.abc import Iterable
from typing import Any

from stellarbyte_server.engine.adapters.absent import no_adapters
from stellarbyte_server.engine.adapters.registry import Adapters
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.grammar.compiler import GrammarCompiler
from stellarbyte_server.engine.run.step_plan import StepResult
from stellarbyte_server.engine.state.block_pool import CacheLayout
from stellarbyte_server.engine.state.kept_blocks import block_keys
from stellarbyte_server.engine.state.sequence import Chunk, Sequence
from stellarbyte_server.protocol.messages import Delta, merged
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.engines.engine import Ahead, ComputedStep, make_scheduler
from tests.support.engines.engine_core import VOCABULARY
from tests.support.engines.symbolic_cache import SymbolicRunner
from tests.support.models.adapters import FakeStore
from tests.support.servers.fake_engine import make_tokenizer

TOKENIZER = make_tokenizer()
GRAMMARS = GrammarCompiler(TOKENIZER, frozenset(), VOCABULARY)  # one for all: each keeps two files open


class CheckedStep(ComputedStep):
    chunks: list[Chunk]

    def finish(self) -> None:
        """Whatever is sampled now may depend on all tokens before."""
        for sequence, start, length, samples, _ in self.chunks:
            assert not samples or sequence.is_over or len(sequence.tokens) == start + length


class CheckedRunner:
    """Samples what a symbolic cache says, and sees that no chunk goes further than its request."""

    num_steps_ahead = 0

    def __init__(self, layout: CacheLayout, budget: int, store: FakeStore | None = None) -> None:
        self._layout = layout
        self._budget = budget
        self._store = store
        self._cache = SymbolicRunner(layout)
        self.seen: set[Sequence] = set()
        self.most_blocks = 0  # of a sequence that decodes
        self.num_sampled = 0

    def recover(self, sequences: Iterable[Sequence]) -> None:
        pass

    def prepare(self) -> bool:
        return False

    def start(self, chunks: list[Chunk]) -> CheckedStep:
        for sequence, start, length, samples, _ in chunks:
            self.seen.add(sequence)
            assert start + length + samples <= sequence.num_prompt + sequence.request.sampling.max_tokens
            num_blocks = len(sequence.table.entries())
            assert num_blocks <= self._layout.peak_blocks(start + length, self._budget)
            if start >= sequence.num_prompt:
                self.most_blocks = max(self.most_blocks, num_blocks)
            if sequence.adapter is not None:
                assert self._store is not None and self._store.in_slots[sequence.adapter_slot] is sequence.adapter
        step = CheckedStep(StepResult(tokens=self._cache.run(chunks)))
        step.chunks = chunks
        self.num_sampled += sum(map(len, step.computed.tokens))
        return step


class CheckedEngine:
    """A core without a model, whose tokens follow from its requests alone."""

    def __init__(
        self, num_steps_ahead: int, adapters: Adapters | None = None, store: FakeStore | None = None, **options: Any
    ) -> None:
        adapters = no_adapters() if adapters is None else adapters
        self.scheduler = make_scheduler(num_steps_ahead=num_steps_ahead, adapters=adapters, **options)
        layout, budget = self.scheduler.layout, self.scheduler.limits.max_num_batched_tokens
        self.runner = CheckedRunner(layout, budget, store)
        runner = Ahead(self.runner) if num_steps_ahead else self.runner
        self.core = EngineCore(self.scheduler, runner, TOKENIZER, frozenset(), adapters, GRAMMARS)
        self.said: dict[str, list[Delta]] = {}

    def step(self) -> None:
        assert self.core.has_work
        for item in self.core.step():
            if isinstance(item, Delta):
                self.said.setdefault(item.request_id, []).append(item)

    def drain(self, *requests: GenerationRequest) -> None:
        for request in requests:
            self.core.submit(request)
        for _ in range(5000):
            if not self.core.has_work:
                return
            self.step()
        raise AssertionError("there is still work")

    def answer(self, request_id: str = "r") -> tuple[list[int], str | None]:
        """The tokens and why they end."""
        found = merged(self.said[request_id])
        return list(found.token_ids), found.finish_reason

    def check_nothing_is_left(self) -> None:
        """No work, no block in use, and in the prefix cache only blocks of tokens that requests got and computed."""
        assert not self.core.has_work and self.scheduler.pool.num_used == 0
        known: set[bytes] = set()
        for sequence in self.runner.seen:
            keys = block_keys(self.scheduler.layout, sequence)
            keys.extend(sequence.tokens, max(sequence.num_prompt, len(sequence.tokens) - 1))
            known.update(keys.keys)
        assert {key for key in self.scheduler.pool._keys if key is not None} <= known
        num_tokens = sum(delta.num_tokens for deltas in self.said.values() for delta in deltas)
        assert self.core.stats().generation_tokens_total == num_tokens

"""Engine cores in this process, over a script or a model, and the messages they answer with."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer

from stellarbyte import ByteTransformer
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte_server.engine.adapters.absent import no_adapters
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.grammar.compiler import GrammarCompiler
from stellarbyte_server.engine.run.host_executor import HostExecutor
from stellarbyte_server.engine.run.runner import PlanRunner
from stellarbyte_server.engine.run.step_plan import StepResult
from stellarbyte_server.engine.schedule.scheduler import Scheduler
from stellarbyte_server.engine.state.sequence import Chunk, Sequence
from stellarbyte_server.protocol.messages import Delta, Rejected
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.engines.engine import Backend, ComputedStep, make_scheduler
from tests.support.servers.fake_engine import make_tokenizer

VOCABULARY = 259  # of `make_tokenizer`: the bytes and three special tokens
END = 256


class Script:
    """Samples the bytes of a text, round and round; the end-of-sequence token for "$"."""

    num_steps_ahead = 0

    def __init__(self, text: str) -> None:
        self._text = text

    def recover(self, sequences: Iterable[Sequence]) -> None:
        pass

    def prepare(self) -> bool:
        return False

    def start(self, chunks: list[Chunk]) -> ComputedStep:
        return ComputedStep(
            StepResult(tokens=[[self._next(sequence.num_generated)] * samples for sequence, _, _, samples, _ in chunks])
        )

    def _next(self, number: int) -> int:
        character = self._text[number % len(self._text)]
        return END if character == "$" else ord(character)


def make_core(
    runner: Any,
    vocab_size: int = VOCABULARY,
    scheduler: Scheduler | None = None,
    tokenizer: Tokenizer | None = None,
    ends: frozenset[int] = frozenset({END}),
    **options: Any,
) -> EngineCore:
    tokenizer = make_tokenizer() if tokenizer is None else tokenizer
    grammars = GrammarCompiler(tokenizer, ends, vocab_size)
    scheduler = make_scheduler(**options) if scheduler is None else scheduler
    return EngineCore(scheduler, runner, tokenizer, ends, no_adapters(), grammars)


def model_core(model: ByteTransformer, backend: Backend, device: str = "cpu", **options: Any) -> EngineCore:
    scheduler = make_scheduler(**options)
    pool, layout = scheduler.pool, scheduler.layout
    cache = PagedKVCache(model.config, pool.num_blocks, layout.block_size, torch.float32, torch.device(device))
    cache.keys_LBSKD.fill_(float("nan"))  # whatever is read before it was written shows
    cache.values_LBSKD.fill_(float("nan"))
    executor = HostExecutor(backend(model, model.config, None), cache, layout)
    return make_core(PlanRunner(executor), model.config.vocab_size, scheduler)


def drain(core: EngineCore, *requests: GenerationRequest, limit_s: float = 60) -> dict[str, list[Any]]:
    """All that is said of the requests, until each has ended."""
    for request in requests:
        core.submit(request)
    said: dict[str, list[Any]] = {request.request_id: [] for request in requests}
    deadline_s = time.monotonic() + limit_s
    while any(not said[r.request_id] or not ended(said[r.request_id][-1]) for r in requests):
        assert time.monotonic() < deadline_s
        core.take_replies()
        if not core.has_work:
            time.sleep(0.001)  # a grammar is being compiled
            continue
        for item in core.step():
            said.setdefault(item.request_id, []).append(item)
    return said


def ended(item: Any) -> bool:
    return isinstance(item, Rejected) or (isinstance(item, Delta) and item.finish_reason is not None)


def text_of(items: list[Any]) -> str:
    return "".join(item.text for item in items if isinstance(item, Delta))

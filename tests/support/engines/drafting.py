"""Engine cores that draft, over tiny models, and random requests of every mix."""

import random
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from stellarbyte import ByteTransformer
from stellarbyte.backends.torch_model import TorchModel
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.lora.bank import LoraBank
from stellarbyte_server.api.structured.grammars import json_grammar
from stellarbyte_server.engine.adapters.absent import no_adapters
from stellarbyte_server.engine.adapters.registry import Adapters
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.drafts.drafts import Drafts
from stellarbyte_server.engine.grammar import mask_workers, token_grammar
from stellarbyte_server.engine.grammar.compiler import GrammarCompiler
from stellarbyte_server.engine.grammar.token_grammar import TokenGrammar
from stellarbyte_server.engine.run.host_executor import HostExecutor
from stellarbyte_server.engine.run.runner import PlanRunner
from stellarbyte_server.engine.state.adapter_version import AdapterVersion
from stellarbyte_server.engine.state.sequence import Sequence
from stellarbyte_server.protocol.adapter_reference import AdapterMix, AdapterReference
from stellarbyte_server.protocol.messages import Delta, Reply, merged
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.engines.engine import Backend, make_request, make_scheduler
from tests.support.engines.engine_core import VOCABULARY
from tests.support.models.adapters import NO_FILES, random_adapter
from tests.support.servers.fake_engine import make_tokenizer

TOKENIZER = make_tokenizer()
GRAMMARS = GrammarCompiler(TOKENIZER, frozenset(), VOCABULARY)  # one for all: each keeps two files open
_ITEM = {
    "type": "object",
    "properties": {"is_new": {"type": "boolean"}, "kind": {"enum": ["a", "b"]}},
    "required": ["is_new", "kind"],
    "additionalProperties": False,
}
FORMS = (
    json_grammar({"type": "array", "items": _ITEM}),
    "start: /([a-f][0-9]){1,30}/",
    'start: "{\\"name\\": \\"" /[a-z]{1,8}/ "\\", \\"number\\": " /[0-9]{1,4}/ "}"',
    'start: ("yes, it is so" | "no, never")',
)


def compute_masks_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the engine's thread compute all masks, however busy the machine is."""
    _limit_masks(monkeypatch, 60.0)


def compute_masks_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let another thread compute all masks but each grammar's first, as if they took long."""
    _limit_masks(monkeypatch, -1.0)


def _limit_masks(monkeypatch: pytest.MonkeyPatch, limit_s: float) -> None:
    monkeypatch.setattr(token_grammar, "QUICK_MASK_S", limit_s)
    for name in ("QUICK_MASK_S", "QUICK_MASKS_S"):
        monkeypatch.setattr(mask_workers, name, limit_s)
    for name in ("QUICK_SHARE", "QUICK_SHARE_OF_ALL"):
        monkeypatch.setattr(mask_workers, name, 0.0)


class Guesses(Drafts):
    """Drafts of random lengths from what is known to come, some tokens of which are wrong."""

    def __init__(self, coming: Mapping[str, list[int]], chance: random.Random, *, runs_ahead: bool = False) -> None:
        super().__init__(clock=lambda: 0.0, runs_ahead=runs_ahead)
        self._coming = coming
        self._chance = chance
        self._runs_ahead = runs_ahead

    def may_draft(self, running: list[Sequence], *, is_ahead: bool = False) -> bool:
        del running, is_ahead
        return not self._runs_ahead or self._chance.random() < 0.7

    def _draft(self, sequence: Sequence, num_rows: int) -> tuple[int, ...]:
        del num_rows
        coming = self._coming.get(sequence.request.request_id, [])[sequence.num_generated :]
        coming += [self._chance.randrange(VOCABULARY) for _ in range(3)]
        draft = coming[: self._chance.choice([0, 1, 2, 3, 7, 12])]
        if draft and self._chance.random() < 0.5:
            draft[self._chance.randrange(len(draft))] = self._chance.randrange(VOCABULARY)
        return tuple(draft)


class ResidentAdapters:
    """A registry of adapters that are always in their slots."""

    def __init__(self, versions: Mapping[str, AdapterVersion]) -> None:
        self._none = no_adapters()
        self._versions = versions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._none, name)

    def bind(self, reference: AdapterReference | AdapterMix, caller: str = "") -> AdapterVersion:
        del caller
        return self._versions[str(reference)]

    def release(self, version: AdapterVersion) -> list[Reply]:
        del version
        return []


def drafting_core(
    model: ByteTransformer,
    drafts: Drafts | None,
    backend: Backend = TorchModel,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> EngineCore:
    """A core with the adapters "a" and "b"."""
    config = model.config
    windows = config.windows
    scheduler = make_scheduler(
        window=max(windows) if all(windows) else None, sink_tokens=config.sink_tokens if any(windows) else 0, **options
    )
    cache = PagedKVCache(
        config, scheduler.pool.num_blocks, scheduler.layout.block_size, torch.float32, torch.device("cpu")
    )
    cache.keys_LBSKD.fill_(float("nan"))  # whatever is read before it was written shows
    cache.values_LBSKD.fill_(float("nan"))
    bank = LoraBank(config, 2, 16)
    versions = {}
    for slot, name in enumerate(("a", "b"), 1):
        bank.fill(slot, random_adapter(config, slot).packed(config))
        versions[name] = AdapterVersion(name=name, files=NO_FILES, content_hash=name, slot=slot)
    adapters: Adapters = ResidentAdapters(versions)  # type: ignore[assignment]
    runner = PlanRunner(HostExecutor(backend(model, config, bank), cache, scheduler.layout))
    grammars = GRAMMARS if tokenizer is None else GrammarCompiler(tokenizer, frozenset(), config.vocab_size)
    tokenizer = TOKENIZER if tokenizer is None else tokenizer
    return EngineCore(scheduler, runner, tokenizer, frozenset({256}), adapters, grammars, drafts=drafts)


def compiled(text: str) -> TokenGrammar:
    GRAMMARS.submit("grammar", text)
    while not (done := GRAMMARS.collect()):
        time.sleep(0.001)
    ((_, grammar),) = done
    assert isinstance(grammar, TokenGrammar)
    return grammar


def random_request(chance: random.Random, name: str, most_tokens: int = 40) -> GenerationRequest:
    """Any mix of sampling, penalties, ends, log-probabilities, adapters, scales and grammars."""
    prompt = [chance.randrange(VOCABULARY) for _ in range(chance.randint(1, 30))]
    if chance.random() < 0.3:
        prompt = (prompt[:5] * 7)[: chance.randint(6, 30)]
    max_tokens = chance.randint(1, most_tokens)
    fields: dict[str, Any] = {"return_token_ids": True, "seed": chance.randrange(2**63)}
    mixes: list[dict[str, Any]] = [
        {"temperature": chance.choice([0.3, 1.0]), "top_p": chance.choice([0.7, 1.0]), "top_k": chance.choice([0, 9])},
        {"min_p": 0.05, "temperature": 0.8, "choice": chance.randrange(3)},
        {"repetition_penalty": chance.choice([0.8, 1.3])},
        {"presence_penalty": chance.uniform(-1, 1), "frequency_penalty": chance.uniform(-0.5, 0.5)},
        {"logit_bias": tuple((chance.randrange(VOCABULARY), chance.uniform(-2, 4)) for _ in range(3))},
        {"min_tokens": chance.randint(0, max_tokens), "stop_token_ids": tuple(range(chance.randrange(60)))},
        {"stop": (chr(chance.randrange(97, 123)), "\n")},
        {"logprobs": chance.randrange(4)},
        {"adapter": chance.choice("ab"), "adapter_scale": chance.choice([0.0, 0.5, 1.0, 2.0])},
        {"grammar": chance.choice(FORMS)},
        {"ignore_eos": True},
        {"cache_salt": chance.choice(["", "x"])},
        {"prompt_logprobs": 1},
    ]
    for mix in mixes:
        if chance.random() < 0.3:
            fields |= mix
    return make_request(prompt, max_tokens, name, **fields)


def answers_of(
    core: EngineCore,
    requests: list[GenerationRequest],
    arrivals: Mapping[str, int],
    aborts: Mapping[str, int],
    limit_s: float = 600,
) -> dict[str, Delta]:
    """All that each request got, arriving before the given steps, and aborted after so many tokens if in `aborts`."""
    said: dict[str, list[Delta]] = {request.request_id: [] for request in requests}
    waiting, open_ids = list(requests), set(said)
    deadline_s, step = time.monotonic() + limit_s, 0
    while open_ids:
        assert time.monotonic() < deadline_s
        while waiting and (arrivals[waiting[0].request_id] <= step or not core.has_work):
            core.submit(waiting.pop(0))
        core.take_replies()
        step += 1
        if not core.has_work:
            time.sleep(0.001)  # a grammar is being compiled
            continue
        for item in core.step():
            if not isinstance(item, Delta) or item.request_id not in open_ids:
                continue
            said[item.request_id].append(item)
            if item.finish_reason is not None:
                open_ids.remove(item.request_id)
            elif sum(delta.num_tokens for delta in said[item.request_id]) >= aborts.get(item.request_id, 10**9):
                core.abort(item.request_id)
                open_ids.remove(item.request_id)
    assert core.scheduler.pool.num_used == 0
    return {name: merged(deltas) for name, deltas in said.items() if deltas}

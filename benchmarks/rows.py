"""The cost of each request feature for a row of a step, at its limit, without the model.

    python -m benchmarks.rows                          8 rows with each feature, the demo model's vocabulary

Rows use the real sampling, log-probabilities and text, with random logits. A feature's figure is the difference of a
row's time with and without it. A schema's figures are those of a random answer: its masks, and the engine thread's part
of their time.
"""

import argparse
import json
import random
import statistics
import time
from typing import Any, cast

import numpy as np
import tokenizers
import torch

from benchmarks.support.record import write_result
from stellarbyte.backends.replaced import RowAdapters
from stellarbyte.backends.torch_model import ServedModel
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte.config import ByteModelConfig
from stellarbyte.forward_batch import ForwardBatch
from stellarbyte.ops.cpu.adjustment import adjust_logits
from stellarbyte.ops.cpu.sampler import sample
from stellarbyte.sampling.adjustment import RowAdjustment
from stellarbyte.sampling.sampler import RowSampling
from stellarbyte_server.api.structured.grammars import json_grammar
from stellarbyte_server.engine.answer import Answer
from stellarbyte_server.engine.grammar.compiler import GrammarCompiler
from stellarbyte_server.engine.grammar.token_grammar import TokenGrammar
from stellarbyte_server.engine.run.host_executor import HostExecutor
from stellarbyte_server.engine.run.runner import PlanRunner
from stellarbyte_server.engine.state.block_pool import BlockTable, CacheLayout
from stellarbyte_server.engine.state.sequence import Chunk, Sequence
from stellarbyte_server.protocol.request import GenerationRequest, SamplingParams

# R rows, V vocabulary, T tokens

LONG = 100_000  # tokens of a long prompt
NUM_ROWS = 8
LAYOUT = CacheLayout(block_size=16, window=16, sink_tokens=0, num_steps_ahead=0)


class _Logits:
    """A model with precomputed logits."""

    def __init__(self, vocab_size: int) -> None:
        self._source_RV = torch.randn(NUM_ROWS, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
        self._logits_RV = self._source_RV.clone()

    def renew(self) -> None:
        """Restore the logits; call it before each step."""
        self._logits_RV.copy_(self._source_RV)

    def hidden(self, batch: ForwardBatch, _: PagedKVCache) -> torch.Tensor:
        return torch.zeros(len(batch.token_ids_T), 8)

    def head(self, hidden_RC: torch.Tensor, _: RowAdapters) -> torch.Tensor:
        return self._logits_RV[: len(hidden_RC)]

    def adjust(self, logits_RV: torch.Tensor, rows: list[RowAdjustment | None]) -> None:
        adjust_logits(logits_RV, rows)

    def sample(self, logits_RV: torch.Tensor, rows: list[RowSampling]) -> list[int]:
        return sample(logits_RV, rows, torch.get_num_threads())


def features(vocab_size: int) -> dict[str, dict[str, Any]]:
    """Sampling parameters by name, and `prompt_tokens`."""
    chance = random.Random(1)
    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    ends = tuple(chance.sample(range(vocab_size), 128))
    return {
        "logit_bias, 1,024 entries": {"logit_bias": tuple((i, 1.5) for i in chance.sample(range(vocab_size), 1024))},
        "penalties, 1,000 tokens": {**penalties, "prompt_tokens": 1000},
        "penalties, 100,000 tokens": {**penalties, "prompt_tokens": LONG},
        "min_tokens, 128 stop tokens": {"min_tokens": 10**6, "stop_token_ids": ends},
        "stop, 4 strings of 1,000 characters": {"stop": tuple(c * 999 + "." for c in "etao")},
        "logprobs, 20 alternatives": {"logprobs": 20},
        "top_k 100, top_p 0.9 and min_p 0.01": {"top_k": 100, "top_p": 0.9, "min_p": 0.01},
        "top_k, all but one": {"top_k": vocab_size - 1},
        "top_p 0.999999 at temperature 2": {"top_p": 0.999999, "temperature": 2.0},
        "nothing, 100,000 tokens": {"prompt_tokens": LONG},
    }


def schemas() -> dict[str, Any]:
    chance = random.Random(2)

    def word(length: int) -> str:
        return "".join(chance.choices("abcdefghijklmnopqrstuvwxyz ", k=length))

    def nested(depth: int, length: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"const": word(length)}
        for _ in range(depth):
            inner = {"type": "object", "properties": {"a": schema, "b": {"const": word(length)}}, "required": ["a"]}
            schema = {"anyOf": [inner, {"const": word(length)}]}
        return schema

    return {
        "one field": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
        "enum of 1,000 words": {"enum": [word(16) for _ in range(1000)]},
        "15 constants of 4,000 characters": {"enum": [word(4000) for _ in range(15)]},
        "15 constants that begin alike": {"enum": ["a" * 3900 + word(100) for _ in range(15)]},
        "nested constants": nested(7, 3000),
        "a list of 15 constants of 4,000 characters": {"const": [word(4000) for _ in range(15)]},
        "500 properties": {"type": "object", "properties": {word(12): {"type": "string"} for _ in range(500)}},
        "long names": {"type": "object", "properties": {word(4000): {"type": "null"} for _ in range(15)}},
        "pattern": {"type": "string", "pattern": "^(.*a.{1,30}|\\p{L}{3,9}b)*$"},
    }


class _Rows:
    """Rows that step together."""

    def __init__(self, model: _Logits, tokenizer: tokenizers.Tokenizer, vocab_size: int, wish: dict[str, Any]) -> None:
        fields = {"max_tokens": 10**6, "ignore_eos": True, **wish}
        num_tokens = fields.pop("prompt_tokens", 16)
        chance = np.random.default_rng(3)
        self.model = model
        cache = PagedKVCache(ByteModelConfig(), 1, LAYOUT.block_size, torch.float32, torch.device("cpu"))
        self.runner = PlanRunner(HostExecutor(cast(ServedModel, model), cache, LAYOUT))
        self.sequences = []
        for i in range(NUM_ROWS):
            prompt = tuple(chance.integers(vocab_size, size=num_tokens).tolist())
            request = GenerationRequest(
                request_id=str(i), prompt_token_ids=prompt, sampling=SamplingParams(seed=i, **fields)
            )
            sequence = Sequence(request=request, table=BlockTable(LAYOUT), rank=(0, i), arrived_s=0.0)
            sequence.table.start_after((), (num_tokens - 1) // 16, [0] * 1000)  # the cache is not used
            sequence.is_running = True
            sequence.end_token_ids = frozenset(request.sampling.stop_token_ids)
            self.sequences.append(sequence)
        self.answers = [Answer(sequence, tokenizer) for sequence in self.sequences]

    def step(self) -> float:
        """Seconds a row."""
        chunks = [Chunk(s, len(s.tokens) - 1, 1, True) for s in self.sequences]
        self.model.renew()
        step = self.runner.start(chunks)
        started_s = time.perf_counter()
        step.finish()
        result = step.result()
        for i, (sequence, answer, tokens) in enumerate(zip(self.sequences, self.answers, result.tokens, strict=True)):
            sequence.tokens.extend(tokens)
            answer.push_all(tokens, result.logprobs.get(i))
        return (time.perf_counter() - started_s) / len(chunks)


def measure_features(model: _Logits, tokenizer: tokenizers.Tokenizer, vocab_size: int, num_steps: int) -> Any:
    """Milliseconds a row: the first step, and the median of the others."""

    def timed(wish: dict[str, Any]) -> tuple[float, float]:
        rows = _Rows(model, tokenizer, vocab_size, {"temperature": 1.0} | wish)
        first, *rest = [1000 * rows.step() for _ in range(num_steps)]
        return first, statistics.median(rest)

    timed({})
    _, plain = timed({})
    found = {"nothing": {"ms": round(plain, 3)}}
    for name, wish in features(vocab_size).items():
        first, median = timed(wish)
        found[name] = {"more_ms": round(median - plain, 3), "first_step_ms": round(first, 3)}
        print(json.dumps({name: found[name]}), flush=True)
    return found


def measure_masks(tokenizer: tokenizers.Tokenizer, vocab_size: int, num_steps: int) -> Any:
    """Milliseconds until a grammar is compiled, of its median and slowest mask, and of the engine's thread for one."""
    compiler = GrammarCompiler(tokenizer, frozenset({2}), vocab_size)
    compiler.prepare()
    found = {}
    for name, schema in schemas().items():
        started_s = time.perf_counter()
        compiler.submit(name, json_grammar(schema))
        while not (done := compiler.collect()):
            time.sleep(0.0005)
        found[name] = {"compile_ms": round(1000 * (time.perf_counter() - started_s), 1)}
        grammar = done[0][1]
        assert isinstance(grammar, TokenGrammar), grammar
        found[name] |= _walk(compiler, grammar, vocab_size, num_steps)
        print(json.dumps({name: found[name]}), flush=True)
    compiler.close()
    return found


def _walk(compiler: GrammarCompiler, grammar: TokenGrammar, vocab_size: int, num_steps: int) -> dict[str, float]:
    """Walk random answers through a grammar, as in the engine."""
    words = np.zeros((vocab_size + 31) // 32, np.uint32)
    chance = np.random.default_rng(0)
    masks_ms, engine_ms = [], []
    for _ in range(num_steps):
        started_s = time.perf_counter()
        while not grammar.is_ready:
            time.sleep(0.00005)  # spinning would hold the GIL that the computing thread needs
        ready_s = time.perf_counter()
        grammar.mask(words)
        ended_s = time.perf_counter()
        masks_ms.append(1000 * (ended_s - started_s))
        engine_ms.append(1000 * (ended_s - ready_s))
        if grammar.error is not None or grammar.is_complete:
            break
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        grammar.accept(int(chance.choice(allowed)))
        compiler.collect()
        grammar.begin_mask()
    return {
        "median_mask_ms": round(statistics.median(masks_ms[1:]), 3),
        "slowest_mask_ms": round(max(masks_ms), 3),
        "median_on_engine_ms": round(statistics.median(engine_ms[1:]), 3),
        "slowest_on_engine_ms": round(max(engine_ms), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab-size", type=int, default=None, help="of the logits (default: the demo model's)")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--no-record", action="store_true", help="print only")
    options = parser.parse_args()
    tokenizer = tokenizers.Tokenizer.from_file(str(resolve_model("demo") / "tokenizer.json"))
    vocab_size = tokenizer.get_vocab_size() if options.vocab_size is None else options.vocab_size
    found = {
        "vocab_size": vocab_size,
        "rows": NUM_ROWS,
        "features": measure_features(_Logits(vocab_size), tokenizer, vocab_size, options.steps),
        "masks": measure_masks(tokenizer, vocab_size, 10 * options.steps),
    }
    if not options.no_record:
        write_result("rows", found)


if __name__ == "__main__":
    main()

"""An engine for tests: real scheduler, pool and, where wanted, model; no sockets, no tokenizer."""

from typing import Any

import torch

from server.engine.block_pool import BlockPool, CacheLayout
from server.engine.model_runner import ModelRunner
from server.engine.request import GenerationRequest, SamplingParams
from server.engine.scheduler import Chunk, Scheduler, SchedulerLimits, Sequence
from stellarbyte import ByteTransformer
from stellarbyte.cache.paged_kv import PagedKVCache


def make_request(
    prompt: list[int], max_tokens: int = 16, request_id: str = "r", seed: int = 0, **sampling: Any
) -> GenerationRequest:
    params = SamplingParams(max_tokens=max_tokens, seed=seed, **({"temperature": 0.0} | sampling))
    return GenerationRequest(request_id=request_id, prompt_token_ids=tuple(prompt), sampling=params)


def make_scheduler(
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    window: int | None = None,
    sink_tokens: int = 0,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 64,
    max_model_len: int = 10_000,
) -> Scheduler:
    limits = SchedulerLimits(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, max_model_len=max_model_len
    )
    layout = CacheLayout(block_size=block_size, window=window, sink_tokens=sink_tokens)
    return Scheduler(limits, layout, BlockPool(num_blocks))


class ModelEngine:
    """Scheduler and model, stepping until every request has its tokens."""

    def __init__(self, model: ByteTransformer, **options: Any) -> None:
        config = model.config
        windows = config.windows
        self.scheduler = make_scheduler(
            window=config.sliding_window if all(windows) else None,
            sink_tokens=config.sink_tokens if any(windows) else 0,
            **options,
        )
        pool, layout = self.scheduler.pool, self.scheduler.layout
        cache = PagedKVCache(config, pool.num_blocks, layout.block_size, torch.float32, torch.device("cpu"))
        cache.keys_LBSKD.fill_(float("nan"))  # whatever is read before it was written shows
        cache.values_LBSKD.zero_()
        self.runner = ModelRunner(model, cache, config)

    def teacher_forced(self, tokens: list[int], first: int) -> torch.Tensor:
        """log p(next token) after tokens first-1, first, ..., each computed by the step that would sample there."""
        sequence = self.scheduler.add(make_request(tokens[:first], max_tokens=len(tokens) - first + 1))
        rows = []
        while len(sequence.tokens) <= len(tokens):
            chunks = self.scheduler.schedule()
            logits_RV = self.runner.logits(chunks)
            if chunks[0].samples:
                rows.append(logits_RV[0].log_softmax(dim=-1))
            following = tokens[len(sequence.tokens)] if len(sequence.tokens) < len(tokens) else 0
            self.scheduler.apply(chunks, [following])
        self.scheduler.remove(sequence)
        return torch.stack(rows)

    def generate(self, requests: list[GenerationRequest]) -> list[list[int]]:
        """The generated tokens of every request, all queued at once."""
        sequences = [self.scheduler.add(request) for request in requests]
        while self.scheduler.has_work:
            self.step()
        return [sequence.tokens[len(sequence.request.prompt_token_ids) :] for sequence in sequences]

    def step(self) -> list[Chunk]:
        chunks = self.scheduler.schedule()
        for sequence, _ in self.scheduler.apply(chunks, self.runner.run(chunks)):
            if is_complete(sequence):
                self.scheduler.remove(sequence)
        return chunks


def is_complete(sequence: Sequence) -> bool:
    return sequence.num_generated >= sequence.request.sampling.max_tokens

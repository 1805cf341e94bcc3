"""Runs the model on a scheduled step. The only part of the engine that touches tensors; knows no text, no sockets."""

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch

from stellarbyte.backends.torch_model import ServedModel
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.forward_batch import ForwardBatch
from stellarbyte.sampling.logprobs import token_logprobs
from stellarbyte.sampling.sampler import NO_TOKEN, RowSampling
from stellarbyte_server.engine.run.adjustments import Adjustments
from stellarbyte_server.engine.run.device_errors import device_errors, require_device
from stellarbyte_server.engine.state.sequence import Chunk, Sequence, StepResult
from stellarbyte_server.protocol.messages import TokenLogprob

# T tokens, C hidden size, N sequences, M blocks of the longest table, R rows that sample, V vocabulary


class ModelRunner:
    """Turns scheduled chunks into batches and logits into tokens, each step to its end. Engine thread only."""

    num_steps_ahead = 0

    def __init__(self, model: ServedModel, cache: PagedKVCache) -> None:
        self.model = model
        self.cache = cache
        self.device = cache.keys_LBSKD.device
        self._adjustments = Adjustments(self.device)

    @torch.inference_mode()
    def start(self, chunks: list[Chunk]) -> "ModelStep":
        """The forward pass, with the tokens that the sequences have."""
        with device_errors():
            batch = make_batch(chunks, self.device)
            return ModelStep(self.model, chunks, batch, self.model.hidden(batch, self.cache), self._adjustments)

    def recover(self, sequences: Iterable[Sequence]) -> None:
        require_device()
        self._adjustments.forget(sequences)

    def prepare(self) -> bool:
        return False

    @torch.inference_mode()
    def logits(self, chunks: list[Chunk]) -> torch.Tensor:
        """Compute the chunks; [R, V] logits after the last token of each chunk that samples."""
        return self.model.logits(make_batch(chunks, self.device), self.cache)


class ModelStep:
    """Final hidden states, and what is made of them."""

    def __init__(
        self,
        model: ServedModel,
        chunks: list[Chunk],
        batch: ForwardBatch,
        hidden_TC: torch.Tensor,
        adjustments: Adjustments,
    ) -> None:
        self._adjustments = adjustments
        self._model = model
        self._chunks = chunks
        self._batch = batch
        self._hidden_TC = hidden_TC
        self._result = StepResult()

    @torch.inference_mode()
    def finish(self) -> None:
        """Sample the next token of each chunk that samples."""
        with device_errors():
            self._finish()

    def _finish(self) -> None:
        result, hidden_TC = self._result, self._hidden_TC
        sampling = [chunk.sequence for chunk in self._chunks if chunk.samples]
        if sampling:
            logits_RV = self._model.head(hidden_TC[self._batch.logits_rows]).float()
            vocab_size = logits_RV.shape[-1]
            scored = [i for i, sequence in enumerate(sampling) if sequence.request.sampling.logprobs is not None]
            scored_RV = logits_RV[scored] if scored else None  # before they are adjusted
            self._model.adjust(logits_RV, [self._adjustments.of(sequence, vocab_size) for sequence in sampling])
            result.tokens = self._model.sample(logits_RV, [sampling_row(sequence) for sequence in sampling])
            if scored_RV is not None:
                tokens = [result.tokens[i] for i in scored]
                result.logprobs = sampled_logprobs([sampling[i] for i in scored], scored_RV, tokens)
        for chunk, start in zip(self._chunks, self._batch.query_starts, strict=False):
            request, chunk_TC = chunk.sequence.request, hidden_TC[start : start + chunk.length]
            if request.sampling.prompt_logprobs is not None:
                result.prompt_logprobs[chunk.sequence] = prompt_logprobs(self._model, chunk, chunk_TC)
            if request.pooling is not None:
                result.pooled[chunk.sequence] = pooled_hidden(request.pooling, chunk_TC)

    def result(self) -> StepResult:
        return self._result


def prompt_logprobs(model: ServedModel, chunk: Chunk, chunk_TC: torch.Tensor) -> list[TokenLogprob]:
    """What a chunk says about the prompt's tokens from its second one on, up to the first after the chunk."""
    sequence = chunk.sequence
    following = sequence.request.prompt_token_ids[chunk.start + 1 : chunk.start + chunk.length + 1]
    num_top = sequence.request.sampling.prompt_logprobs or 0
    if not following:
        return []
    found = token_logprobs(model.head(chunk_TC[: len(following)]), following, [num_top] * len(following))
    return [TokenLogprob(token_id, *entry) for token_id, entry in zip(following, found, strict=True)]


def pooled_hidden(pooling: Literal["last", "mean"], chunk_TC: torch.Tensor) -> np.ndarray:
    """What a chunk adds to its prompt's vector, float32 [C]; see `Answer.add_pooled`."""
    pooled_C = chunk_TC[-1] if pooling == "last" else chunk_TC.sum(dim=0)
    return pooled_C.float().numpy(force=True)


def sampled_logprobs(
    sequences: list[Sequence], logits_RV: torch.Tensor, tokens: list[int]
) -> dict[Sequence, TokenLogprob]:
    """Log-probabilities of the new tokens of sequences, all of which want them, as far as there are tokens."""
    rows = [i for i, token in enumerate(tokens) if token != NO_TOKEN]
    if not rows:
        return {}
    num_top = [sequences[i].request.sampling.logprobs or 0 for i in rows]
    found = token_logprobs(logits_RV[rows], [tokens[i] for i in rows], num_top)
    return {sequences[i]: TokenLogprob(tokens[i], *entry) for i, entry in zip(rows, found, strict=True)}


def sampling_row(sequence: Sequence) -> RowSampling:
    sampling = sequence.request.sampling
    return RowSampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        choice=sampling.choice,
        position=len(sequence.tokens),
    )


def make_batch(chunks: list[Chunk], device: torch.device) -> ForwardBatch:
    """The flat row of tokens and the block tables of a step, on `device`."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    offsets: list[int] = []
    starts = [0]
    tables = [chunk.sequence.table.entries() for chunk in chunks]
    logits_rows = []
    reach = 0
    for chunk, entries in zip(chunks, tables, strict=True):
        sequence, table = chunk.sequence, chunk.sequence.table
        stop = chunk.start + chunk.length
        token_ids += sequence.tokens[chunk.start : stop]
        positions += range(chunk.start, stop)
        for position in range(chunk.start, stop):
            block, offset = table.locate(position)
            slots.append(block * table.layout.block_size + offset)
            offsets.append(offset)
        starts.append(len(token_ids))
        if chunk.samples:
            logits_rows.append(len(token_ids) - 1)
        reach = max(reach, _reach(stop - 1, entries, table.layout.window, table.layout.sink_tokens))
    width = max(len(entries) for entries in tables)
    block_tables, block_bases = np.zeros((2, len(chunks), width), dtype=np.int64)
    for i, entries in enumerate(tables):
        block_tables[i, : len(entries)], block_bases[i, : len(entries)] = zip(*entries, strict=True)

    def tensor(values: list[int] | np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64)).to(device)

    return ForwardBatch(
        token_ids_T=tensor(token_ids),
        positions_T=tensor(positions),
        slots_T=tensor(slots),
        offsets_T=tensor(offsets),
        query_starts=tuple(starts),
        block_tables_NM=tensor(block_tables),
        block_bases_NM=tensor(block_bases),
        num_blocks=tuple(len(entries) for entries in tables),
        num_sink_blocks=tuple(len(chunk.sequence.table.sink_blocks) for chunk in chunks),
        reach=reach,
        logits_rows=tensor(logits_rows),
        adapter_slots=tuple(chunk.sequence.adapter_slot for chunk in chunks),
        adapter_scales=tuple(chunk.sequence.request.adapter_scale for chunk in chunks),
    )


def _reach(last: int, entries: list[tuple[int, int]], window: int | None, sink_tokens: int) -> int:
    """The largest distance between a query of a sequence and a base it meets. Sinks are met from a capped position."""
    if window is None:
        return last
    oldest = min((base for _, base in entries if base >= sink_tokens), default=0)
    return max(last - oldest, min(last, window + sink_tokens))

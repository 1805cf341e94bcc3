"""Runs the model on a scheduled step. The only part of the engine that touches tensors; knows no text, no sockets."""

import numpy as np
import torch

from server.engine.sequence import Chunk
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.forward_batch import ForwardBatch
from stellarbyte.kernels.served_model import ServedModel
from stellarbyte.sampling import RowSampling

# T tokens, N sequences, M blocks of the longest table, R rows that sample, V vocabulary


class ModelRunner:
    """Turns scheduled chunks into batches and logits into tokens. Engine thread only."""

    def __init__(self, model: ServedModel, cache: PagedKVCache) -> None:
        self.model = model
        self.cache = cache
        self.device = cache.keys_LBSKD.device

    @torch.inference_mode()
    def run(self, chunks: list[Chunk]) -> list[int]:
        """Compute the chunks; returns the next token of each chunk that samples, in order."""
        rows = [sampling_row(chunk) for chunk in chunks if chunk.samples]
        logits_RV = self.logits(chunks)
        return self.model.sample(logits_RV, rows) if rows else []

    @torch.inference_mode()
    def logits(self, chunks: list[Chunk]) -> torch.Tensor:
        """Compute the chunks; [R, V] logits after the last token of each chunk that samples."""
        return self.model.logits(make_batch(chunks, self.device), self.cache)


def sampling_row(chunk: Chunk) -> RowSampling:
    sequence, sampling = chunk.sequence, chunk.sequence.request.sampling
    return RowSampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        choice=0,
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

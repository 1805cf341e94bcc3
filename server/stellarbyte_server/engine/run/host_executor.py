"""The executor of plans for any `ServedModel`: the host builds the batch of each step and completes its sampling."""

from typing import NamedTuple

import numpy as np
import torch

from stellarbyte.backends.torch_model import ServedModel
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.forward_batch import ForwardBatch
from stellarbyte.sampling.sampler import NO_TOKEN
from stellarbyte_server.engine.run.device_errors import device_errors, require_device
from stellarbyte_server.engine.run.executor_slot import ExecutorSlot
from stellarbyte_server.engine.run.outputs import add_logprobs, sampling_row
from stellarbyte_server.engine.run.step_plan import Finish, SlotBegin, StepPlan, StepResult, TableChange
from stellarbyte_server.engine.state.block_pool import BlockTable, CacheLayout

# T tokens, C hidden size, N sequences, M blocks of the longest table, R rows that sample, V vocabulary


class _Slot(ExecutorSlot):
    """A sequence and its blocks."""

    def __init__(self, begin: SlotBegin, layout: CacheLayout, device: torch.device) -> None:
        super().__init__(begin, device)
        self.table = BlockTable(layout)

    def change_table(self, change: TableChange) -> None:
        table = self.table
        live = table.blocks[: change.first - table.num_freed] if table.blocks else []
        sinks = table.sink_blocks[: change.first_sink] + change.sink_blocks
        live += change.blocks
        num_live = len(change.blocks) + change.first - change.num_freed
        table.start_after(sinks, change.num_freed, live[len(live) - num_live :])


class _Row(NamedTuple):
    """Tokens start..start+length of a sequence."""

    slot: _Slot
    start: int
    length: int
    samples: bool


class HostExecutor:
    """Runs one step at a time. Engine thread only."""

    num_steps_ahead = 0

    def __init__(self, model: ServedModel, cache: PagedKVCache, layout: CacheLayout) -> None:
        self.model = model
        self.cache = cache
        self._layout = layout
        self._device = cache.keys_LBSKD.device
        self._slots: dict[int, _Slot] = {}
        self._decode_slots: list[int] = []

    @torch.inference_mode()
    def start(self, plan: StepPlan) -> "HostStep":
        """Run the forward pass; all earlier tokens are known."""
        with device_errors():
            rows = self._rows(plan)
            batch = make_batch(rows, self._device)
            return HostStep(self.model, rows, batch, self.model.hidden(batch, self.cache))

    def recover(self) -> None:
        require_device()

    def prepare(self) -> bool:
        return False

    def _rows(self, plan: StepPlan) -> list[_Row]:
        """Apply a plan's changes; returns the rows to compute."""
        slots = self._slots
        for number in plan.ended:
            slots.pop(number, None)
        for begin in plan.begins:
            slots[begin.slot] = _Slot(begin, self._layout, self._device)
        for rewind in plan.rewinds:
            slots[rewind.slot].rewind(rewind)
        for change in plan.tables:
            slots[change.slot].change_table(change)
        if plan.decode_slots is not None:
            self._decode_slots = plan.decode_slots
        decoding = [slots[number] for number in self._decode_slots]
        rows = [_Row(slot, len(slot.tokens) - 1, 1, True) for slot in decoding]
        return rows + [_Row(slots[chunk.slot], chunk.start, chunk.length, chunk.samples) for chunk in plan.chunks]


class _AdaptedHead:
    """A model's last part for rows of one sequence."""

    def __init__(self, model: ServedModel, begin: SlotBegin) -> None:
        self._model = model
        self._adapter = begin.adapter_slot, begin.adapter_scale

    def head(self, hidden_RC: torch.Tensor) -> torch.Tensor:
        return self._model.head(hidden_RC, [self._adapter] * len(hidden_RC))


class HostStep:
    """A step with its final hidden states."""

    def __init__(self, model: ServedModel, rows: list[_Row], batch: ForwardBatch, hidden_TC: torch.Tensor) -> None:
        self._model = model
        self._rows = rows
        self._batch = batch
        self._hidden_TC = hidden_TC
        self._result = StepResult(tokens=[[] for _ in rows])

    @torch.inference_mode()
    def finish(self, finish: Finish) -> None:
        """Sample the next token of each row that samples."""
        with device_errors():
            self._sample(finish)
            for row, ((slot, start, length, _), first) in enumerate(
                zip(self._rows, self._batch.query_starts, strict=False)
            ):
                if slot.wants_hidden:
                    head = _AdaptedHead(self._model, slot.begin)
                    slot.read_prompt(self._result, row, head, start, self._hidden_TC[first : first + length])

    def result(self) -> StepResult:
        return self._result

    def _sample(self, finish: Finish) -> None:
        sampling = [(row, slot) for row, (slot, _, _, samples) in enumerate(self._rows) if samples]
        if not sampling:
            return
        model, result = self._model, self._result
        adapters = [(slot.begin.adapter_slot, slot.begin.adapter_scale) for _, slot in sampling]
        logits_RV = model.head(self._hidden_TC[self._batch.logits_rows], adapters).float()
        vocab_size = logits_RV.shape[-1]
        scored = [
            i for i, (row, s) in enumerate(sampling) if s.sampling.logprobs is not None and row not in finish.over
        ]
        scored_RV = logits_RV[scored] if scored else None  # before adjustment
        adjustments = [
            None if row in finish.over else slot.adjustment.before(slot.tokens, finish.masks.get(row), vocab_size)
            for row, slot in sampling
        ]
        model.adjust(logits_RV, adjustments)
        tokens = model.sample(logits_RV, [sampling_row(slot.sampling, len(slot.tokens)) for _, slot in sampling])
        for (row, slot), token in zip(sampling, tokens, strict=True):
            if token == NO_TOKEN:
                result.not_sampled.append(row)
                token = 0  # the sequence ends, but a step ahead still computes it
            slot.tokens.append(token)
            result.tokens[row].append(token)
        if scored_RV is not None:
            rows = [sampling[i][0] for i in scored]
            num_top = [sampling[i][1].sampling.logprobs or 0 for i in scored]
            add_logprobs(result, rows, num_top, scored_RV, [tokens[i] for i in scored])


def make_batch(rows: list[_Row], device: torch.device) -> ForwardBatch:
    """The flat row of tokens and the block tables of a step, on `device`."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    offsets: list[int] = []
    starts = [0]
    tables = [row.slot.table.entries() for row in rows]
    logits_rows = []
    reach = 0
    for row, entries in zip(rows, tables, strict=True):
        table = row.slot.table
        stop = row.start + row.length
        token_ids += row.slot.tokens[row.start : stop]
        positions += range(row.start, stop)
        for position in range(row.start, stop):
            block, offset = table.locate(position)
            slots.append(block * table.layout.block_size + offset)
            offsets.append(offset)
        starts.append(len(token_ids))
        if row.samples:
            logits_rows.append(len(token_ids) - 1)
        reach = max(reach, _reach(stop - 1, entries, table.layout.window, table.layout.sink_tokens))
    width = max(len(entries) for entries in tables)
    block_tables, block_bases = np.zeros((2, len(rows), width), dtype=np.int64)
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
        num_sink_blocks=tuple(len(row.slot.table.sink_blocks) for row in rows),
        reach=reach,
        logits_rows=tensor(logits_rows),
        adapter_slots=tuple(row.slot.begin.adapter_slot for row in rows),
        adapter_scales=tuple(row.slot.begin.adapter_scale for row in rows),
    )


def _reach(last: int, entries: list[tuple[int, int]], window: int | None, sink_tokens: int) -> int:
    """The largest distance between a query and a visible block's base. For sinks, the window caps the position."""
    if window is None:
        return last
    oldest = min((base for _, base in entries if base >= sink_tokens), default=0)
    return max(last - oldest, min(last, window + sink_tokens))

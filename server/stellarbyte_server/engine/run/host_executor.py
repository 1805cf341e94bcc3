"""The executor of plans for any `ServedModel`: the host builds the batch of each step and completes its sampling.

A row with a draft samples a token in the place of each of the draft's tokens and one after them, each as if the draft's
tokens before it were the sequence's. It keeps those up to the first that differs from the draft.
"""

from array import array
from typing import NamedTuple

import numpy as np
import torch

from stellarbyte.backends.torch_model import ServedModel
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.forward_batch import ForwardBatch
from stellarbyte.sampling.adjustment import RowAdjustment
from stellarbyte.sampling.sampler import NO_TOKEN
from stellarbyte_server.engine.run.device_errors import device_errors, require_device
from stellarbyte_server.engine.run.executor_slot import ExecutorSlot
from stellarbyte_server.engine.run.outputs import add_logprobs, sampling_row
from stellarbyte_server.engine.run.step_plan import Finish, SlotBegin, StepPlan, StepResult, TableChange
from stellarbyte_server.engine.state.block_pool import BlockTable, CacheLayout

# T tokens, C hidden size, N sequences, M blocks of the longest table, R sampled tokens, V vocabulary


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
    draft: tuple[int, ...] = ()  # the last of these tokens

    @property
    def num_known(self) -> int:
        """Tokens of the sequence."""
        return self.start + self.length - len(self.draft)

    def token_ids(self) -> "array[int]":
        known = self.slot.tokens[self.start : self.num_known]
        return known + array("I", self.draft) if self.draft else known


class _Sampled(NamedTuple):
    """A token that a step samples."""

    number: int  # of the row
    row: _Row
    depth: int  # tokens of the row's draft before it


class HostExecutor:
    """Runs one step at a time. Engine thread only."""

    num_steps_ahead = 0
    takes_drafts = True

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
            sampled = _sampled(rows)
            batch = make_batch(rows, sampled, self._device)
            return HostStep(self.model, rows, sampled, batch, self.model.hidden(batch, self.cache))

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
        for chunk in plan.chunks:
            rows.append(_Row(slots[chunk.slot], chunk.start, chunk.length, chunk.samples, chunk.draft))
        return rows


class _AdaptedHead:
    """A model's last part for rows of one sequence."""

    def __init__(self, model: ServedModel, begin: SlotBegin) -> None:
        self._model = model
        self._adapter = begin.adapter_slot, begin.adapter_scale

    def head(self, hidden_RC: torch.Tensor) -> torch.Tensor:
        return self._model.head(hidden_RC, [self._adapter] * len(hidden_RC))


class HostStep:
    """A step with its final hidden states."""

    def __init__(
        self,
        model: ServedModel,
        rows: list[_Row],
        sampled: list[_Sampled],
        batch: ForwardBatch,
        hidden_TC: torch.Tensor,
    ) -> None:
        self._model = model
        self._rows = rows
        self._sampled = sampled
        self._batch = batch
        self._hidden_TC = hidden_TC
        self._result = StepResult(tokens=[[] for _ in rows])

    @torch.inference_mode()
    def finish(self, finish: Finish) -> None:
        """Sample the next token of each row that samples."""
        with device_errors():
            self._sample(finish)
            for row, ((slot, start, length, *_), first) in enumerate(
                zip(self._rows, self._batch.query_starts, strict=False)
            ):
                if slot.wants_hidden:
                    head = _AdaptedHead(self._model, slot.begin)
                    slot.read_prompt(self._result, row, head, start, self._hidden_TC[first : first + length])

    def result(self) -> StepResult:
        return self._result

    def _sample(self, finish: Finish) -> None:
        sampled = self._sampled
        if not sampled:
            return
        model, result = self._model, self._result
        adapters = [(row.slot.begin.adapter_slot, row.slot.begin.adapter_scale) for _, row, _ in sampled]
        logits_RV = model.head(self._hidden_TC[self._batch.logits_rows], adapters).float()
        scored = [
            i
            for i, (number, row, _) in enumerate(sampled)
            if row.slot.sampling.logprobs is not None and number not in finish.over
        ]
        scored_RV = logits_RV[scored] if scored else None  # before adjustment
        self._adjust(logits_RV, finish)
        params = [sampling_row(row.slot.sampling, row.num_known + depth) for _, row, depth in sampled]
        tokens = model.sample(logits_RV, params)
        kept = self._keep(tokens, finish, logits_RV.shape[-1])
        if scored_RV is not None:
            places = [place for place, i in enumerate(scored) if i in kept]
            scored = [scored[place] for place in places]
            num_top = [sampled[i].row.slot.sampling.logprobs or 0 for i in scored]
            rows = [sampled[i].number for i in scored]
            add_logprobs(result, rows, num_top, scored_RV[places], [tokens[i] for i in scored])

    def _adjust(self, logits_RV: torch.Tensor, finish: Finish) -> None:
        """Adjust all logits. A slot has one state of penalties, so its tokens are adjusted one after another, and
        between them it gets the draft's tokens."""
        sampled, vocab_size = self._sampled, logits_RV.shape[-1]
        start = 0
        while start < len(sampled):
            depth = sampled[start].depth
            stop = next((i for i in range(start, len(sampled)) if sampled[i].depth > depth), len(sampled))
            adjustments: list[RowAdjustment | None] = []
            for number, row, _ in sampled[start:stop]:
                slot, mask = row.slot, finish.masks.get(number)
                if depth:
                    slot.tokens.append(row.draft[depth - 1])
                if mask is not None and row.draft:
                    mask = _mask_at(mask, depth, vocab_size)
                is_over = number in finish.over
                adjustments.append(None if is_over else slot.adjustment.before(slot.tokens, mask, vocab_size))
            self._model.adjust(logits_RV[start:stop], adjustments)
            start = stop

    def _keep(self, tokens: list[int], finish: Finish, vocab_size: int) -> set[int]:
        """Put what was sampled into the result and the slots, of each row up to the first token that differs from its
        draft; returns the indices in `tokens` of these."""
        result, kept = self._result, set[int]()
        goes_on = [True] * len(self._rows)
        for i, ((number, row, depth), token) in enumerate(zip(self._sampled, tokens, strict=True)):
            if not goes_on[number]:
                continue
            if depth and (token == NO_TOKEN or not _has_mask(finish.masks.get(number), depth, vocab_size)):
                goes_on[number] = False  # the next step begins here, and finds the same
                continue
            if token == NO_TOKEN:
                result.not_sampled.append(number)
                token = 0  # the sequence ends, but a step ahead still computes it
            kept.add(i)
            result.tokens[number].append(token)
            goes_on[number] = depth < len(row.draft) and token == row.draft[depth]
        for row, kept_tokens in zip(self._rows, result.tokens, strict=True):
            if row.draft:
                row.slot.tokens[row.num_known :] = array("I", kept_tokens)
                row.slot.adjustment.rewind(row.num_known + len(kept_tokens) - 1)
            elif row.samples:
                row.slot.tokens.append(kept_tokens[0])
        return kept


def _mask_at(masks: bytes, depth: int, vocab_size: int) -> bytes | None:
    """The mask for the token after so many of a draft's; None: there is none."""
    size = 4 * ((vocab_size + 31) // 32)
    return masks[depth * size : (depth + 1) * size] or None


def _has_mask(masks: bytes | None, depth: int, vocab_size: int) -> bool:
    """Whether there is a mask for that token, or it needs none."""
    return masks is None or _mask_at(masks, depth, vocab_size) is not None


def _sampled(rows: list[_Row]) -> list[_Sampled]:
    """The tokens that a step samples, by depth, then by row."""
    sampled = [_Sampled(number, row, 0) for number, row in enumerate(rows) if row.samples]
    drafted = [each for each in sampled if each.row.draft]
    depth = 1
    while drafted:
        sampled += [_Sampled(number, row, depth) for number, row, _ in drafted]
        depth += 1
        drafted = [each for each in drafted if len(each.row.draft) >= depth]
    return sampled


def make_batch(rows: list[_Row], sampled: list[_Sampled], device: torch.device) -> ForwardBatch:
    """The flat row of tokens and the block tables of a step, on `device`."""
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    offsets: list[int] = []
    starts = [0]
    tables = [row.slot.table.entries() for row in rows]
    reach = 0
    for row, entries in zip(rows, tables, strict=True):
        table = row.slot.table
        stop = row.start + row.length
        token_ids += row.token_ids()
        positions += range(row.start, stop)
        for position in range(row.start, stop):
            block, offset = table.locate(position)
            slots.append(block * table.layout.block_size + offset)
            offsets.append(offset)
        starts.append(len(token_ids))
        reach = max(reach, _reach(stop - 1, entries, table.layout.window, table.layout.sink_tokens))
    logits_rows = [starts[number + 1] - 1 - len(row.draft) + depth for number, row, depth in sampled]
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
        num_plain=_num_plain(rows),
    )


def _num_plain(rows: list[_Row]) -> tuple[int, ...]:
    """The tokens of each row before its adapter's first one; (): there are none."""
    if not any([row.slot.begin.adapter_start > row.start for row in rows]):
        return ()
    return tuple(row.slot.num_plain(row.start, row.length) for row in rows)


def _reach(last: int, entries: list[tuple[int, int]], window: int | None, sink_tokens: int) -> int:
    """The largest distance between a query and a visible block's base. For sinks, the window caps the position."""
    if window is None:
        return last
    oldest = min((base for _, base in entries if base >= sink_tokens), default=0)
    return max(last - oldest, min(last, window + sink_tokens))

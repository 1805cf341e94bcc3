"""The executor of plans for any `ServedModel`: the host builds the batch of each step and completes its sampling."""

import numpy as np
import torch

from stellarbyte.backends.torch_model import ServedModel
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.forward_batch import ForwardBatch
from stellarbyte_server.engine.run.device_errors import device_errors, require_device
from stellarbyte_server.engine.run.executor_slot import Row, Sampled, sampled_tokens
from stellarbyte_server.engine.run.host_step import HostSlot, HostStep
from stellarbyte_server.engine.run.step_plan import StepPlan
from stellarbyte_server.engine.state.block_pool import CacheLayout

# T tokens, C hidden size, N sequences, M blocks of the longest table, R sampled tokens, V vocabulary


class HostExecutor:
    """Runs one step at a time. Engine thread only."""

    num_steps_ahead = 0
    takes_drafts = True
    position = 0

    def __init__(self, model: ServedModel, cache: PagedKVCache, layout: CacheLayout) -> None:
        self.model = model
        self.cache = cache
        self._layout = layout
        self._device = cache.keys_LBSKD.device
        self._slots: dict[int, HostSlot] = {}
        self._decode_slots: list[int] = []

    @torch.inference_mode()
    def start(self, plan: StepPlan) -> "HostStep":
        """Run the forward pass; all earlier tokens are known."""
        with device_errors():
            rows = self._rows(plan)
            sampled = sampled_tokens(rows)
            batch = make_batch(rows, sampled, self._device)
            return HostStep(self.model, rows, sampled, batch, self.model.hidden(batch, self.cache))

    def recover(self) -> None:
        require_device()

    def prepare(self) -> bool:
        return False

    def _rows(self, plan: StepPlan) -> list[Row[HostSlot]]:
        """Apply a plan's changes; returns the rows to compute."""
        slots = self._slots
        for number in plan.ended:
            slots.pop(number, None)
        for begin in plan.begins:
            slots[begin.slot] = HostSlot(begin, self._layout, self._device)
        for rewind in plan.rewinds:
            slots[rewind.slot].rewind(rewind)
        for change in plan.tables:
            slots[change.slot].change_table(change)
        if plan.decode_slots is not None:
            self._decode_slots = plan.decode_slots
        decoding = [slots[number] for number in self._decode_slots]
        rows = [Row(slot, len(slot.tokens) - 1, 1, True) for slot in decoding]
        for chunk in plan.chunks:
            rows.append(Row(slots[chunk.slot], chunk.start, chunk.length, chunk.samples, chunk.draft))
        return rows


def make_batch(rows: list[Row[HostSlot]], sampled: list[Sampled[HostSlot]], device: torch.device) -> ForwardBatch:
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


def _num_plain(rows: list[Row[HostSlot]]) -> tuple[int, ...]:
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

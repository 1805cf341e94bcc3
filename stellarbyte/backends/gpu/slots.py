"""The state of running sequences on the GPU: a row of 32-bit numbers for each slot, which steps read and advance.

The host changes it by pairs of (index, value), one copy for each step; a step with an unchanged batch needs none. No
sequence has slot 0: padding rows of a batch use it, and write their keys to a block of the cache that no sequence has.
"""

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from stellarbyte.ops.triton.overlap import overlapping, wait_for_inputs
from stellarbyte.ops.triton.sampling.sampler import SamplingRows

# S slots, E entries of a block table, F fields of a slot, B rows of a batch, C hidden size, U updates

POSITION, TOKEN, TEMPERATURE, TOP_K, TOP_P, MIN_P, STATE_LOW, STATE_HIGH = range(8)
NUM_FIELDS = 16  # a power of two; the block table follows them

Integers = npt.NDArray[np.int32]


class SlotMemory:
    """The slots, and the slot of each row of the running batch. Addresses are fixed: graphs keep them.

    `numbers` is one flat tensor: the slots, then for every row its slot, then the row's adapter scale, then starts,
    counts and bank slots of the adapter segments (see `lora.LoraRows`).
    """

    def __init__(self, num_slots: int, max_rows: int, table_entries: int, device: torch.device) -> None:
        self.max_rows = max_rows
        self.slot_size = NUM_FIELDS + -(-table_entries // 4) * 4
        state_size = (num_slots + 1) * self.slot_size
        self.rows_at, self.scales_at, self.starts_at, self.counts_at, self.bank_slots_at = (
            state_size + i * max_rows for i in range(5)
        )
        self.numbers = torch.zeros(state_size + 5 * max_rows, dtype=torch.int32, device=device)
        self.slots_SF = self.numbers[:state_size].view(num_slots + 1, self.slot_size)
        self.tables_SE = self.slots_SF[:, NUM_FIELDS : NUM_FIELDS + table_entries]
        self.rows_B = self._part(self.rows_at)
        self.scales_B = self._part(self.scales_at).view(torch.float32)
        self.segment_starts_B = self._part(self.starts_at)
        self.segment_counts_B = self._part(self.counts_at)
        self.segment_slots_B = self._part(self.bank_slots_at)
        self._upload = Upload(device)

    def _part(self, start: int) -> torch.Tensor:
        return self.numbers[start : start + self.max_rows]

    def field_at(self, slot: int, field: int) -> int:
        """The index of a slot's field in `numbers`."""
        return slot * self.slot_size + field

    def table_at(self, slot: int, entry: int) -> int:
        return slot * self.slot_size + NUM_FIELDS + entry

    def update(self, indices: list[int], values: list[int]) -> None:
        """Set numbers[indices] = values, ordered after all steps so far; no index twice. float32 values are given as
        bits."""
        count = len(indices)
        if not count:
            return
        pairs = self._upload.copy(np.array([indices, values], dtype=np.int64).astype(np.int32).reshape(-1))
        _update_kernel[(triton.cdiv(count, 256),)](self.numbers, pairs, count, BLOCK=256)


class Upload:
    """Copies small arrays to the device without waiting, through pinned buffers used in turn."""

    _NUM_BUFFERS = 4

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[torch.Tensor | None] = [None] * self._NUM_BUFFERS
        self._copied: list[torch.cuda.Event | None] = [None] * self._NUM_BUFFERS
        self._next = 0

    def copy(self, values: Integers, out: torch.Tensor | None = None) -> torch.Tensor:
        """The values on the device, at the start of `out` if given."""
        if self._device.type != "cuda":
            copied = torch.from_numpy(values.copy())
            return copied if out is None else out[: len(values)].copy_(copied)
        i, self._next = self._next, (self._next + 1) % self._NUM_BUFFERS
        buffer, event = self._buffers[i], self._copied[i]
        if event is not None:
            event.synchronize()  # usually long complete
        if buffer is None or len(buffer) < len(values):
            buffer = torch.empty(max(4096, 2 * len(values)), dtype=torch.int32, pin_memory=True)
            self._buffers[i] = buffer
        buffer[: len(values)].numpy()[:] = values
        target = torch.empty(len(values), dtype=torch.int32, device=self._device) if out is None else out[: len(values)]
        target.copy_(buffer[: len(values)], non_blocking=True)
        event = self._copied[i] = torch.cuda.Event()
        event.record()
        return target


def float_bits(value: float) -> int:
    """A float32 as the 32-bit integer that has its bits."""
    return int(np.float32(value).view(np.int32))


def sampling_rows(fields_BF: torch.Tensor) -> SamplingRows:
    """The sampler's view of rows filled by `begin_decode` or `gather_fields`."""
    floats_BF = fields_BF.view(torch.float32)
    return SamplingRows(
        temperature_R=floats_BF[:, TEMPERATURE],
        top_k_R=fields_BF[:, TOP_K],
        top_p_R=floats_BF[:, TOP_P],
        min_p_R=floats_BF[:, MIN_P],
        state_R2=fields_BF[:, STATE_LOW : STATE_HIGH + 1],
        positions_R=fields_BF[:, POSITION],
    )


def begin_decode(
    memory: SlotMemory,
    embedding_VC: torch.Tensor,
    positions_B: torch.Tensor,
    fields_BF: torch.Tensor,
    x_BC: torch.Tensor,
    multiplier: float = 1.0,
    first_token: int = 0,
) -> None:
    """For every row: the position, the embedding of its slot's newest token times `multiplier`, and its fields.

    The embedding's first row is that of `first_token`; tokens without a row have zeros. Advances the slot to the next
    position, which is also the one among the fields.
    """
    _begin_kernel[(len(x_BC),)](
        memory.rows_B, memory.slots_SF, memory.slot_size, embedding_VC, first_token, *embedding_VC.shape, positions_B,
        fields_BF, x_BC, multiplier, IS_DECODE=True, SCALES=multiplier != 1, FIELDS=NUM_FIELDS,
        BLOCK=triton.next_power_of_2(embedding_VC.shape[1]), **overlapping(x_BC.device),
    )  # fmt: skip


def gather_fields(
    memory: SlotMemory, slots_R: torch.Tensor, positions_R: torch.Tensor, fields_RF: torch.Tensor
) -> None:
    """Copy the fields of the given slots, with these positions in the place of the slots' own."""
    _begin_kernel[(len(slots_R),)](
        slots_R, memory.slots_SF, memory.slot_size, slots_R, 0, 1, 1, positions_R, fields_RF, slots_R, 1.0,
        IS_DECODE=False, SCALES=False, FIELDS=NUM_FIELDS, BLOCK=1, **overlapping(slots_R.device),
    )  # fmt: skip


def store_tokens(memory: SlotMemory, slots_R: torch.Tensor, tokens_R: torch.Tensor) -> None:
    """Set the newest tokens of slots, except slot 0. NO_TOKEN is stored as 0: the next step, although its results are
    discarded, looks the token up in the embedding.
    """
    count = len(tokens_R)
    _store_kernel[(triton.cdiv(count, 256),)](
        slots_R, memory.slots_SF, memory.slot_size, tokens_R, count, BLOCK=256, **overlapping(tokens_R.device)
    )


@triton.jit(do_not_specialize=["count"])
def _update_kernel(numbers, pairs, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    index = tl.load(pairs + i, mask=inside, other=0)
    tl.store(numbers + index, tl.load(pairs + count + i, mask=inside, other=0), mask=inside)


@triton.jit
def _begin_kernel(
    rows, slots, slot_size, embedding, first_token, num_tokens, width, positions, fields, x, multiplier,
    IS_DECODE: tl.constexpr, SCALES: tl.constexpr, FIELDS: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    b = tl.program_id(0)
    slot = tl.load(rows + b)
    base = slots + slot.to(tl.int64) * slot_size
    field = tl.arange(0, FIELDS)
    values = tl.load(base + field)
    if IS_DECODE:
        position = tl.load(base)  # POSITION
        token = tl.load(base + 1) - first_token  # TOKEN
        values = tl.where(field == 0, position + 1, values)
        tl.store(positions + b, position)
        tl.debug_barrier()  # every thread has read the position
        tl.store(base, position + 1, mask=slot != 0)
        column = tl.arange(0, BLOCK)
        inside = column < width
        is_there = inside & (token >= 0) & (token < num_tokens)
        numbers = tl.load(embedding + token.to(tl.int64) * width + column, mask=is_there, other=0.0)
        if SCALES:
            numbers = (numbers.to(tl.float32) * multiplier).to(numbers.dtype)
        tl.store(x + b.to(tl.int64) * width + column, numbers, mask=inside)
    else:
        values = tl.where(field == 0, tl.load(positions + b), values)
    tl.store(fields + b * FIELDS + field, values)


@triton.jit(do_not_specialize=["count"])
def _store_kernel(rows, slots, slot_size, tokens, count, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_inputs(OVERLAPS)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    slot = tl.load(rows + i, mask=inside, other=0)
    token = tl.maximum(tl.load(tokens + i, mask=inside, other=0), 0)
    tl.store(slots + slot.to(tl.int64) * slot_size + 1, token, mask=inside & (slot != 0))

"""The executor of plans for a GPU, with decoding sequences resident in slots.

A slot's newest token and position are on the GPU before the host knows them, so the next step can be launched while one
runs. The host uploads only changes: new sequences, new blocks, another batch.
"""

import torch

from stellarbyte.backends.gpu import slots
from stellarbyte.backends.gpu.preparation import Preparation
from stellarbyte.backends.gpu.prompts import Prompts
from stellarbyte.backends.gpu.slots import float_bits
from stellarbyte.backends.gpu.steps import Computed, Steps
from stellarbyte.ops.triton.lora import segments
from stellarbyte.sampling.sampler import choice_state
from stellarbyte_server.engine.run.device_errors import device_errors, require_device
from stellarbyte_server.engine.run.executor import OutOfDeviceMemory
from stellarbyte_server.engine.run.executor_slot import Row
from stellarbyte_server.engine.run.slot_step import ResidentSlot, SlotStep
from stellarbyte_server.engine.run.step_plan import SlotBegin, StepPlan, TableChange
from stellarbyte_server.engine.run.verifying_step import VerifyingStep
from stellarbyte_server.engine.state.block_pool import CacheLayout
from stellarbyte_server.garbage import keep_for_good

_WORD = 0xFFFFFFFF


class SlotExecutor:
    """Engine thread only."""

    num_steps_ahead = 1

    def __init__(
        self, steps: Steps, layout: CacheLayout, max_rows: int, preparation: Preparation | None = None
    ) -> None:
        self._steps = steps
        self.takes_drafts = steps.max_drafted > 0
        self.cache = steps.cache
        self._preparation = preparation
        self._num_sink_blocks = layout.num_sink_blocks
        self._ring = steps.memory.tables_SE.shape[1] - layout.num_sink_blocks
        self._slots: dict[int, ResidentSlot] = {}
        self._rows: list[ResidentSlot] = []  # decoding rows, in the order of the plan
        self._order: list[int] = []  # row of the batch → index in `_rows`
        self._num_segments = 0  # of rows with adapters
        self._truncates = self._needs_host = self._beyond_plain = False  # of any row
        self._slots_beyond_plain = steps.model.bank.slots_beyond_plain
        self._indices: list[int] = []
        self._values: list[int] = []
        self._pinned = [_pinned(2 * max_rows) for _ in range(self.num_steps_ahead + 1)]

    def start(self, plan: StepPlan) -> "SlotStep":
        """Launch a step without waiting for the GPU.

        Raises:
            OutOfDeviceMemory, DeviceLost
        """
        try:
            with device_errors(), torch.inference_mode():
                return self._start(plan)
        except OutOfDeviceMemory:
            self._forget_batch()
            raise

    def recover(self) -> None:
        require_device()
        self._forget_batch()

    def _forget_batch(self) -> None:
        """Forget the batch after a failure, as its state on the GPU is unknown."""
        self._rows, self._indices, self._values = [], [], []

    @property
    def position(self) -> int:
        """See `RankExecutor`."""
        return self._steps.position

    def prepare(self) -> bool:
        """Capture a graph that later steps will run."""
        if self._preparation is None:
            return False
        try:
            goes_on = self._preparation.capture_next()
        except torch.OutOfMemoryError:  # this one and others are captured on first use
            goes_on = self._preparation.is_led
        if not goes_on:
            self._preparation = None
            keep_for_good()  # compilation allocates many objects
        return goes_on

    def _start(self, plan: StepPlan) -> "SlotStep":
        self._note(plan)
        if any([chunk.draft for chunk in plan.chunks]):
            return self._start_verifying(plan)
        decoding = self._rows
        prompt_slots = [self._slots[chunk.slot] for chunk in plan.chunks]
        for chunk in plan.chunks:
            if chunk.samples:
                self._set(chunk.slot, slots.POSITION, chunk.start + chunk.length)
        self._upload()
        step = SlotStep(self._steps, self._pinned[0], len(decoding) + len(prompt_slots))
        self._pinned.append(self._pinned.pop(0))
        if decoding:
            computed = self._steps.decode(
                len(decoding),
                num_segments=self._num_segments,
                truncates=self._truncates,
                beyond_plain=self._beyond_plain,
            )
            step.add_part(computed, [decoding[i] for i in self._order], self._order, self._needs_host)
        if prompt_slots:  # after decoding: graphs share memory, including this one's logits
            rows = [
                Row(slot, chunk.start, chunk.length, chunk.samples)
                for slot, chunk in zip(prompt_slots, plan.chunks, strict=True)
            ]
            computed = self._prefill(plan, rows, [row.token_ids().tolist() for row in rows])
            sampling = [i for i, chunk in enumerate(plan.chunks) if chunk.samples]
            sampled = [prompt_slots[i] for i in sampling]
            needs_host = any([slot.needs_host for slot in sampled])
            step.add_part(computed, sampled, [len(decoding) + i for i in sampling], needs_host)
            if computed.hidden_TC is not None:
                step.prompts = list(zip(prompt_slots, plan.chunks, strict=True))
        return step

    def _start_verifying(self, plan: StepPlan) -> "VerifyingStep":
        """A step with drafts: no slot decodes."""
        self._upload()
        rows = [Row(self._slots[c.slot], c.start, c.length, c.samples, c.draft) for c in plan.chunks]
        token_ids = []
        for row, chunk in zip(rows, plan.chunks, strict=True):
            if row.samples:  # the slot may lack the newest token
                known = row.slot.tokens[row.start : row.num_known - 1].tolist()
                token_ids.append([*known, chunk.newest_token_id, *row.draft])
            else:
                token_ids.append(row.token_ids().tolist())
        computed = self._prefill(plan, rows, token_ids)
        step = VerifyingStep(self._steps, rows, [chunk.slot for chunk in plan.chunks], computed)
        if computed.hidden_TC is not None:
            step.prompts = list(zip([row.slot for row in rows], plan.chunks, strict=True))
        return step

    def _prefill(self, plan: StepPlan, rows: list[Row[ResidentSlot]], token_ids: list[list[int]]) -> Computed:
        """Compute the chunks of a plan."""
        prompts = Prompts()
        for row, chunk, ids in zip(rows, plan.chunks, token_ids, strict=True):
            begin = row.slot.begin
            prompts.add(
                ids, row.start, chunk.slot, num_samples=1 + len(row.draft) if row.samples else 0,
                bank_slot=begin.adapter_slot, scale=begin.adapter_scale,
                num_plain=row.slot.num_plain(row.start, row.length),
            )  # fmt: skip
        return self._steps.prefill(
            prompts,
            truncates=any([row.slot.truncates for row in rows if row.samples]),
            wants_hidden=any([row.slot.wants_hidden and row.start < row.slot.begin.num_prompt for row in rows]),
            beyond_plain=any([row.slot.begin.adapter_slot in self._slots_beyond_plain for row in rows]),
        )

    def _upload(self) -> None:
        self._steps.memory.update(self._indices, self._values)
        self._indices, self._values = [], []

    def _note(self, plan: StepPlan) -> None:
        """Apply a plan's changes, and upload those that the GPU needs."""
        for number in plan.ended:
            self._slots.pop(number, None)
        for begin in plan.begins:
            self._begin(begin)
        for rewind in plan.rewinds:
            self._slots[rewind.slot].rewind(rewind)
            self._set(rewind.slot, slots.POSITION, rewind.num_tokens - 1)
            self._set(rewind.slot, slots.TOKEN, rewind.last_token_id)
        for change in plan.tables:
            self._change_table(change)
        if plan.decode_slots is not None:
            self._set_rows(plan.decode_slots, plan.decode_starts)

    def _set(self, slot: int, field: int, value: int) -> None:
        self._indices.append(self._steps.memory.field_at(slot, field))
        self._values.append(value)

    def _begin(self, begin: SlotBegin) -> None:
        """Upload a sequence's sampling parameters."""
        slot = self._slots[begin.slot] = ResidentSlot(begin, self._steps.model.device)
        sampling, is_random = slot.sampling, slot.is_random
        state = choice_state(sampling.seed, sampling.choice)
        for place, value in (
            (slots.TEMPERATURE, float_bits(sampling.temperature)),
            (slots.TOP_K, sampling.top_k if is_random else 0),
            (slots.TOP_P, float_bits(sampling.top_p if is_random else 1.0)),
            (slots.MIN_P, float_bits(sampling.min_p if is_random else 0.0)),
            (slots.STATE_LOW, state & _WORD),
            (slots.STATE_HIGH, state >> 32),
        ):
            self._set(begin.slot, place, value)

    def _change_table(self, change: TableChange) -> None:
        """Upload new blocks. Freed ones stay in the table, where no query sees them."""
        memory = self._steps.memory
        for entry, block in enumerate(change.sink_blocks, change.first_sink):
            self._indices.append(memory.table_at(change.slot, entry))
            self._values.append(block)
        for number, block in enumerate(change.blocks, change.first):
            self._indices.append(memory.table_at(change.slot, self._num_sink_blocks + number % self._ring))
            self._values.append(block)

    def _set_rows(self, numbers: list[int], starts: list[int]) -> None:
        """Make these the rows of the batch, ordered by adapter."""
        self._rows = decoding = [self._slots[number] for number in numbers]
        self._truncates = any([slot.truncates for slot in decoding])
        self._needs_host = any([slot.needs_host for slot in decoding])
        bank_slots = [slot.begin.adapter_slot for slot in decoding]
        self._beyond_plain = not self._slots_beyond_plain.isdisjoint(bank_slots)
        # Long sequences first, so that the last programs are short.
        order = sorted(range(len(decoding)), key=lambda i: (bank_slots[i], -starts[i]))
        self._order, self._num_segments = order, 0
        memory = self._steps.memory
        count = next((n for n in self._steps.row_counts if n >= len(decoding)), 0)
        self._fill(memory.rows_at, [numbers[i] for i in order], count)
        if any(bank_slots):
            first, counts, ids = segments([bank_slots[i] for i in order])
            self._num_segments = len(first)
            self._fill(memory.starts_at, first, count)
            self._fill(memory.counts_at, counts, count)
            self._fill(memory.bank_slots_at, ids, count)
            scales = [float_bits(decoding[i].begin.adapter_scale if bank_slots[i] else 0.0) for i in order]
            self._fill(memory.scales_at, scales, count)

    def _fill(self, start: int, values: list[int], count: int) -> None:
        """Write values from `start` on, then zeros up to `count`."""
        self._indices += range(start, start + count)
        self._values += values
        self._values += [0] * (count - len(values))


def _pinned(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, pin_memory=torch.cuda.is_available())

"""Runs steps on a GPU: which slots sequences have, what is uploaded, when tokens are read. Knows no kernels, no text.

A sequence that decodes lives on the GPU: its newest token and position are there before the host knows them, so the
next step can be launched while one runs. The host says only what changes: new sequences, new blocks, another batch.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from stellarbyte.backends.gpu import slots
from stellarbyte.backends.gpu.preparation import Preparation
from stellarbyte.backends.gpu.prompts import Prompts
from stellarbyte.backends.gpu.slots import float_bits
from stellarbyte.backends.gpu.steps import Computed, Steps
from stellarbyte.ops.triton.lora import segments
from stellarbyte.sampling.adjustment import adjust_logits
from stellarbyte.sampling.sampler import choice_state, sample
from stellarbyte_server.engine.run.adjustments import Adjustments, adjusts
from stellarbyte_server.engine.run.cpu_runner import pooled_hidden, prompt_logprobs, sampled_logprobs, sampling_row
from stellarbyte_server.engine.run.device_errors import device_errors, require_device
from stellarbyte_server.engine.run.runner import OutOfDeviceMemory
from stellarbyte_server.engine.state.block_pool import BlockTable, CacheLayout
from stellarbyte_server.engine.state.sequence import Chunk, Sequence, StepResult
from stellarbyte_server.garbage import keep_for_good

# R rows that sample, V vocabulary

_WORD = 0xFFFFFFFF


@dataclass(kw_only=True, slots=True)
class _Slot:
    """What the GPU knows of a sequence."""

    number: int
    generation: int  # of the block table
    truncates: bool  # top_k, top_p or min_p
    needs_host: bool  # its tokens are sampled by the host's rules, or their log-probabilities are wanted
    num_sink_blocks: int = 0  # uploaded
    num_blocks: int = 0  # of the others, freed ones included
    capacity: int = 0  # of the table when it was uploaded
    decodes: bool = False  # its newest token is on the GPU


class GpuRunner:
    """Engine thread only."""

    num_steps_ahead = 1

    def __init__(
        self, steps: Steps, layout: CacheLayout, max_rows: int, preparation: Preparation | None = None
    ) -> None:
        self._steps = steps
        self._preparation = preparation
        self._num_sink_blocks = layout.num_sink_blocks
        self._ring = steps.memory.tables_SE.shape[1] - layout.num_sink_blocks
        self._slots: dict[Sequence, _Slot] = {}
        self._free = list(range(max_rows, 0, -1))
        self._rows: list[Sequence] = []  # of the last step, in the scheduler's order
        self._order: list[int] = []  # row → place among them
        self._num_segments = 0  # of rows with adapters
        self._indices: list[int] = []
        self._values: list[int] = []
        self._adjustments = Adjustments(steps.model.device)
        self._pinned = [_pinned(2 * max_rows) for _ in range(self.num_steps_ahead + 1)]

    def start(self, chunks: list[Chunk]) -> "GpuStep":
        """Launch a step; nothing here waits for the GPU.

        Raises:
            OutOfDeviceMemory, DeviceLost
        """
        try:
            with device_errors(), torch.inference_mode():
                return self._start(chunks)
        except OutOfDeviceMemory:
            self._rows, self._indices, self._values = [], [], []  # nobody knows how far they got
            raise

    def recover(self, sequences: Iterable[Sequence]) -> None:
        """Begin anew with sequences of a step that failed: how far it got is not known, neither here nor on the GPU."""
        require_device()
        self._rows, self._indices, self._values = [], [], []
        sequences = list(sequences)
        self._adjustments.forget(sequences)
        for sequence in sequences:
            if (slot := self._slots.pop(sequence, None)) is not None:
                self._free.append(slot.number)

    def prepare(self) -> bool:
        """Capture a graph that later steps will run."""
        if self._preparation is None:
            return False
        try:
            goes_on = self._preparation.capture_next()
        except torch.OutOfMemoryError:  # the rest is captured when there is a use for it
            goes_on = False
        if not goes_on:
            self._preparation = None
            keep_for_good()  # compiling leaves much behind
        return goes_on

    def _start(self, chunks: list[Chunk]) -> "GpuStep":
        decoding: list[Sequence] = []
        decode_places: list[int] = []  # among the step's sampled tokens
        prompts = Prompts()
        prompt_chunks: list[Chunk] = []
        prompt_places: list[int] = []
        num_samples = 0
        truncates = prompts_truncate = wants_hidden = needs_host = False
        for chunk in chunks:
            sequence, start, length, samples = chunk
            table = sequence.table
            slot = self._slots.get(sequence)
            if slot is None or slot.generation != table.generation:
                slot = self._renew_slot(sequence, slot)
            if table.capacity != slot.capacity:
                self._upload_blocks(slot, table)
            needs_host |= slot.needs_host
            if slot.decodes:
                decoding.append(sequence)
                decode_places.append(num_samples)
                truncates |= slot.truncates
            else:
                if samples:
                    self._set(slot, slots.POSITION, start + length)
                    prompt_places.append(num_samples)
                    slot.decodes = True
                    prompts_truncate |= slot.truncates
                prompts.add(
                    sequence.tokens[start : start + length].tolist(), start, slot.number, samples=samples,
                    bank_slot=sequence.adapter_slot, scale=sequence.request.adapter_scale,
                )  # fmt: skip
                prompt_chunks.append(chunk)
                wants_hidden |= (
                    sequence.request.sampling.prompt_logprobs is not None or sequence.request.pooling is not None
                )
            num_samples += samples
        if decoding != self._rows:
            self._set_rows(decoding)
        self._steps.memory.update(self._indices, self._values)
        self._indices, self._values = [], []
        step = GpuStep(self._steps, self._adjustments, self._pinned[0], num_samples, needs_host)
        self._pinned.append(self._pinned.pop(0))
        if decoding:
            computed = self._steps.decode(len(decoding), num_segments=self._num_segments, truncates=truncates)
            step.parts.append(
                _Part(computed, [decoding[i] for i in self._order], [decode_places[i] for i in self._order])
            )
        if prompt_chunks:  # after decoding: graphs share memory, and this one's logits are among it
            computed = self._steps.prefill(prompts, truncates=prompts_truncate, wants_hidden=wants_hidden)
            sampling = [chunk.sequence for chunk in prompt_chunks if chunk.samples]
            step.parts.append(_Part(computed, sampling, prompt_places))
            if wants_hidden:
                step.prompt_chunks = prompt_chunks
        return step

    def _set(self, slot: _Slot, field: int, value: int) -> None:
        self._indices.append(self._steps.memory.field_at(slot.number, field))
        self._values.append(value)

    def _renew_slot(self, sequence: Sequence, old: _Slot | None) -> _Slot:
        """Give a sequence that begins, or begins again, a slot with what its sampling needs."""
        if old is None and not self._free:
            self._release_ended()
        sampling = sequence.request.sampling
        is_random = sampling.temperature > 0
        slot = self._slots[sequence] = _Slot(
            number=self._free.pop() if old is None else old.number,
            generation=sequence.table.generation,
            truncates=is_random and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0),
            needs_host=_needs_host(sequence),
        )
        state = choice_state(sampling.seed, sampling.choice)
        for place, value in (
            (slots.TEMPERATURE, float_bits(sampling.temperature)),
            (slots.TOP_K, sampling.top_k if is_random else 0),
            (slots.TOP_P, float_bits(sampling.top_p if is_random else 1.0)),
            (slots.MIN_P, float_bits(sampling.min_p if is_random else 0.0)),
            (slots.STATE_LOW, state & _WORD),
            (slots.STATE_HIGH, state >> 32),
        ):
            self._set(slot, place, value)
        return slot

    def _release_ended(self) -> None:
        for sequence in [s for s in self._slots if not s.is_running]:
            self._free.append(self._slots.pop(sequence).number)

    def _upload_blocks(self, slot: _Slot, table: BlockTable) -> None:
        """Enter the blocks that a sequence got since the last time."""
        memory = self._steps.memory
        num_blocks = table.num_freed + len(table.blocks)
        for entry in range(slot.num_sink_blocks, len(table.sink_blocks)):
            self._indices.append(memory.table_at(slot.number, entry))
            self._values.append(table.sink_blocks[entry])
        for number in range(max(slot.num_blocks, table.num_freed), num_blocks):
            self._indices.append(memory.table_at(slot.number, self._num_sink_blocks + number % self._ring))
            self._values.append(table.blocks[number - table.num_freed])
        slot.num_sink_blocks, slot.num_blocks, slot.capacity = len(table.sink_blocks), num_blocks, table.capacity

    def _set_rows(self, decoding: list[Sequence]) -> None:
        """Make these the rows of the batch, those with one adapter beside each other."""
        self._rows = decoding
        bank_slots = [sequence.adapter_slot for sequence in decoding]
        has_adapters = any(bank_slots)
        # Long sequences first: what is begun last should not take longest.
        order = sorted(range(len(decoding)), key=lambda i: (bank_slots[i], -decoding[i].num_launched))
        self._order, self._num_segments = order, 0
        memory = self._steps.memory
        count = next((n for n in self._steps.row_counts if n >= len(decoding)), 0)
        self._fill(memory.rows_at, [self._slots[decoding[i]].number for i in self._order], count)
        if has_adapters:
            starts, counts, ids = segments([bank_slots[i] for i in self._order])
            self._num_segments = len(starts)
            self._fill(memory.starts_at, starts, count)
            self._fill(memory.counts_at, counts, count)
            self._fill(memory.bank_slots_at, ids, count)
            scales = [float_bits(decoding[i].request.adapter_scale if bank_slots[i] else 0.0) for i in self._order]
            self._fill(memory.scales_at, scales, count)

    def _fill(self, start: int, values: list[int], count: int) -> None:
        """Numbers from `start` on, zeros up to `count`."""
        self._indices += range(start, start + count)
        self._values += values
        self._values += [0] * (count - len(values))


@dataclass(slots=True)
class _Part:
    """What was launched together: decoding sequences, or prompts."""

    computed: Computed
    sequences: list[Sequence]  # those that sample, row by row
    places: list[int]  # of their tokens among the step's


class GpuStep:
    """A step on its way."""

    def __init__(
        self, steps: Steps, adjustments: Adjustments, pinned: torch.Tensor, num_samples: int, needs_host: bool
    ) -> None:
        self._steps = steps
        self._adjustments = adjustments
        self._pinned = pinned
        self._num_samples = num_samples
        self._needs_host = needs_host
        self._done: torch.cuda.Event | None = None
        self._result = StepResult()
        self.parts: list[_Part] = []
        self.prompt_chunks: list[Chunk] = []

    def finish(self) -> None:
        """Sample what needs tokens that the host knows by now, and let the tokens come back.

        Raises:
            OutOfDeviceMemory, DeviceLost
        """
        with device_errors(), torch.inference_mode():
            self._finish()

    def _finish(self) -> None:
        if self._needs_host:
            for part in self.parts:
                self._sample_by_host(part)
        if self.prompt_chunks:
            self._read_prompts()
        start = 0
        for part in self.parts:
            count = len(part.sequences)
            self._pinned[start : start + count].copy_(part.computed.tokens_R, non_blocking=True)
            start += count
        if self._pinned.is_pinned():
            self._done = torch.cuda.Event()
            self._done.record()

    def result(self) -> StepResult:
        """Wait for the step; DeviceLost."""
        if self._done is not None:
            with device_errors():
                self._done.synchronize()
        tokens = self._pinned[: self._num_samples].tolist()
        ordered = [0] * self._num_samples
        start = 0
        for part in self.parts:
            for place, token in zip(part.places, tokens[start : start + len(part.places)], strict=True):
                ordered[place] = token
            start += len(part.places)
        self._result.tokens = ordered
        return self._result

    def _sample_by_host(self, part: _Part) -> None:
        logits_RV, sequences = part.computed.logits_RV, part.sequences
        adjustments = [None if s.is_over else self._adjustments.of(s, logits_RV.shape[-1]) for s in sequences]
        rows = [i for i, wanted in enumerate(adjustments) if wanted is not None]
        if rows:
            adjusted_RV = logits_RV[rows].float()
            adjust_logits(adjusted_RV, [adjustments[i] for i in rows])
            tokens_R = sample(adjusted_RV, [sampling_row(sequences[i]) for i in rows])
            self._steps.replace_tokens(part.computed, rows, tokens_R)
        wanted = [i for i, s in enumerate(sequences) if s.request.sampling.logprobs is not None and not s.is_over]
        if wanted:
            tokens = part.computed.tokens_R[wanted].tolist()
            self._result.logprobs |= sampled_logprobs([sequences[i] for i in wanted], logits_RV[wanted], tokens)

    def _read_prompts(self) -> None:
        hidden_TC = self.parts[-1].computed.hidden_TC
        assert hidden_TC is not None
        start = 0
        for chunk in self.prompt_chunks:
            chunk_TC = hidden_TC[start : start + chunk.length]
            request = chunk.sequence.request
            if request.sampling.prompt_logprobs is not None:
                self._result.prompt_logprobs[chunk.sequence] = prompt_logprobs(self._steps.model, chunk, chunk_TC)
            if request.pooling is not None:
                self._result.pooled[chunk.sequence] = pooled_hidden(request.pooling, chunk_TC)
            start += chunk.length


def _needs_host(sequence: Sequence) -> bool:
    """Whether the host has a say in a sequence's tokens, or wants more than the tokens."""
    return adjusts(sequence) or sequence.request.sampling.logprobs is not None


def _pinned(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, pin_memory=torch.cuda.is_available())

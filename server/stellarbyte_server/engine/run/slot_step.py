"""A running step of the slot-resident executor: the host's part of sampling, and the copy of its tokens."""

from dataclasses import dataclass

import torch

from stellarbyte.backends.gpu.model import TritonModel
from stellarbyte.backends.gpu.steps import Computed, Steps
from stellarbyte.ops.triton.lora import rows_of_one
from stellarbyte.sampling.adjustment import adjust_logits
from stellarbyte.sampling.sampler import NO_TOKEN, RowSampling, sample
from stellarbyte_server.engine.run.device_errors import device_errors
from stellarbyte_server.engine.run.executor_slot import ExecutorSlot
from stellarbyte_server.engine.run.outputs import add_logprobs, sampling_row
from stellarbyte_server.engine.run.step_plan import Finish, PlannedChunk, SlotBegin, StepResult, needs_host

# R rows that sample, V vocabulary

_PROMPT_ROWS = 256


class ResidentSlot(ExecutorSlot):
    """A sequence on the GPU. `tokens`: those of its begin, and, if they depend on the host, all read so far."""

    def __init__(self, begin: SlotBegin, device: torch.device) -> None:
        super().__init__(begin, device)
        sampling = begin.sampling
        self.is_random = sampling.temperature > 0
        self.truncates = self.is_random and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0)
        self.needs_host = needs_host(sampling, begin.has_grammar)


class _AdaptedHead:
    """A model's last part for rows of one sequence."""

    def __init__(self, model: TritonModel, slot: ResidentSlot) -> None:
        self._model = model
        self._begin = slot.begin

    def head(self, hidden_RC: torch.Tensor) -> torch.Tensor:
        begin, adapters = self._begin, None
        if begin.adapter_slot in self._model.bank.slots_beyond_plain:
            adapters = rows_of_one(len(hidden_RC), begin.adapter_slot, begin.adapter_scale, hidden_RC.device)
        return self._model.head(hidden_RC, adapters=adapters)


@dataclass(slots=True)
class StepPart:
    """Rows launched together: decoding sequences, or prompts."""

    computed: Computed
    sampling: list[ResidentSlot]  # rows that sample, in order
    rows: list[int]  # of the plan
    needs_host: bool


class SlotStep:
    """A launched step."""

    def __init__(self, steps: Steps, pinned: torch.Tensor, num_rows: int) -> None:
        self._steps = steps
        self._pinned = pinned
        self._done: torch.cuda.Event | None = None
        self._result = StepResult(tokens=[[] for _ in range(num_rows)])
        self.parts: list[StepPart] = []
        self.prompts: list[tuple[ResidentSlot, PlannedChunk]] = []  # whose hidden states are needed

    def add_part(self, computed: Computed, sampling: list[ResidentSlot], rows: list[int], needs_host: bool) -> None:
        self.parts.append(StepPart(computed, sampling, rows, needs_host))

    def finish(self, finish: Finish) -> None:
        """Sample the rows that depend on the host, and start the copy of all tokens.

        Raises:
            OutOfDeviceMemory, DeviceLost
        """
        with device_errors(), torch.inference_mode():
            self._finish(finish)

    def _finish(self, finish: Finish) -> None:
        for part in self.parts:
            if part.needs_host:
                self._sample_by_host(part, finish)
        if self.prompts:
            self._read_prompts(self.parts[-1].computed)
        start = 0
        for part in self.parts:
            count = len(part.rows)
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
        tokens = self._result.tokens
        start = 0
        for part in self.parts:
            sampled = self._pinned[start : start + len(part.rows)].tolist()
            if NO_TOKEN in sampled:  # their sequences end, but a step ahead still computes them, with token 0
                self._result.not_sampled += [part.rows[i] for i, token in enumerate(sampled) if token == NO_TOKEN]
                sampled = [max(0, token) for token in sampled]
            for row, token in zip(part.rows, sampled, strict=True):
                tokens[row] = [token]
            if part.needs_host:
                for slot, token in zip(part.sampling, sampled, strict=True):
                    if slot.needs_host:
                        slot.tokens.append(token)
            start += len(part.rows)
        return self._result

    def _sample_by_host(self, part: StepPart, finish: Finish) -> None:
        logits_RV, vocab_size = part.computed.logits_RV, part.computed.logits_RV.shape[-1]
        over = set(finish.over)
        adjustments = [
            None if row in over else slot.adjustment.before(slot.tokens, finish.mask(row), vocab_size)
            for row, slot in zip(part.rows, part.sampling, strict=True)
        ]
        adjusted = [i for i, wanted in enumerate(adjustments) if wanted is not None]
        if adjusted:
            adjusted_RV = logits_RV[adjusted].float()
            adjust_logits(adjusted_RV, [adjustments[i] for i in adjusted])
            sampled = [part.sampling[i] for i in adjusted]
            params = [sampling_row(slot.sampling, len(slot.tokens)) for slot in sampled]
            tokens_R = sample_rows(self._steps.model, adjusted_RV, params)
            self._steps.replace_tokens(part.computed, adjusted, tokens_R)
        scored = [
            i for i, slot in enumerate(part.sampling)
            if slot.sampling.logprobs is not None and part.rows[i] not in over
        ]  # fmt: skip
        if scored:
            tokens = part.computed.tokens_R[scored].tolist()
            num_top = [part.sampling[i].sampling.logprobs or 0 for i in scored]
            add_logprobs(self._result, [part.rows[i] for i in scored], num_top, logits_RV[scored], tokens)

    def _read_prompts(self, computed: Computed) -> None:
        hidden_TC = computed.hidden_TC
        assert hidden_TC is not None
        first_row = len(self._result.tokens) - len(self.prompts)
        # Several ranks have up to three copies of logits at once, which no rehearsal has measured.
        rows_at_once = None if self._steps.model.ranks is None else _PROMPT_ROWS
        start = 0
        for row, (slot, chunk) in enumerate(self.prompts, first_row):
            head, chunk_TC = _AdaptedHead(self._steps.model, slot), hidden_TC[start : start + chunk.length]
            slot.read_prompt(self._result, row, head, chunk.start, chunk_TC, rows_at_once)
            start += chunk.length


def sample_rows(model: TritonModel, logits_RV: torch.Tensor, rows: list[RowSampling]) -> torch.Tensor:
    """A token for each row, by the host: rank 0's, since torch orders the sums of top_p on a GPU differently each time,
    and also by the number of rows."""
    if model.ranks is not None:
        return model.ranks.of_first_rank(sample(logits_RV, rows))
    if not model.is_invariant:
        return sample(logits_RV, rows)
    return torch.cat([sample(logits_1V, [row]) for logits_1V, row in zip(logits_RV.split(1), rows, strict=True)])

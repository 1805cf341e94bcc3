"""A step of the slot-resident executor that verifies drafts. No other step is in flight, so it waits for the GPU.

The GPU samples a token after each one of a draft, as if those before it were the sequence's; the host replaces those of
rows that depend on it. Then the GPU gets the newest token of each row that counts.
"""

import torch

from stellarbyte.backends.gpu.steps import Computed, Steps
from stellarbyte.sampling.adjustment import RowAdjustment, adjust_logits
from stellarbyte.sampling.sampler import NO_TOKEN
from stellarbyte_server.engine.run.executor_slot import Row, Sampled, extend_along, is_forced, keep
from stellarbyte_server.engine.run.outputs import add_logprobs, sampling_row
from stellarbyte_server.engine.run.slot_step import ResidentSlot, SlotStep, sample_rows
from stellarbyte_server.engine.run.step_plan import Finish, StepResult

# R sampled tokens, row after row, V vocabulary


class VerifyingStep(SlotStep):
    """A launched step of rows that the host knows."""

    def __init__(self, steps: Steps, rows: list[Row[ResidentSlot]], numbers: list[int], computed: Computed) -> None:
        """`numbers`: of the slots."""
        super().__init__(steps, torch.empty(0), len(rows))
        self._rows = rows
        self._numbers = numbers
        self._computed = computed
        self._sampled = [
            Sampled(number, row, depth)
            for number, row in enumerate(rows)
            if row.samples
            for depth in range(1 + len(row.draft))
        ]

    def result(self) -> StepResult:
        return self._result

    def _finish(self, finish: Finish) -> None:
        if self._sampled:
            self._sample(finish)
        if self.prompts:
            self._read_prompts(self._computed)

    def _sample(self, finish: Finish) -> None:
        sampled = self._sampled
        drawn = self._computed.tokens_R.tolist()
        tokens = {
            i: each.row.draft[each.depth] if token != NO_TOKEN and is_forced(finish, each) else token
            for i, (each, token) in enumerate(zip(sampled, drawn, strict=True))
            if not finish.has_end(each.number, each.depth)
        }
        tokens |= self._adjusted(finish, [i for i in tokens if not is_forced(finish, sampled[i])])
        kept = sorted(keep(sampled, tokens, self._result))
        scored = [
            i
            for i in kept
            if sampled[i].row.slot.sampling.logprobs is not None and sampled[i].number not in finish.over
        ]
        if scored:
            num_top = [sampled[i].row.slot.sampling.logprobs or 0 for i in scored]
            rows = [sampled[i].number for i in scored]
            add_logprobs(
                self._result, rows, num_top, self._computed.logits_RV[scored], [tokens.get(i, NO_TOKEN) for i in scored]
            )
        self._settle()

    def _adjusted(self, finish: Finish, chosen: list[int]) -> dict[int, int]:
        """The tokens of rows with adjusted logits, by index in `_sampled`. A slot has one state of penalties, so its
        tokens are adjusted one after another, and between them it gets the draft's tokens."""
        logits_RV, sampled = self._computed.logits_RV, self._sampled
        places: list[int] = []
        parts: list[torch.Tensor] = []
        chosen = [i for i in chosen if sampled[i].row.slot.needs_host and sampled[i].number not in finish.over]
        for depth in sorted({sampled[i].depth for i in chosen}):
            adjustments: dict[int, RowAdjustment] = {}
            for i in chosen:
                number, row, own_depth = sampled[i]
                if own_depth != depth:
                    continue
                extend_along(row, depth)
                mask = finish.mask(number, depth)
                adjustment = row.slot.adjustment.before(row.slot.tokens, mask, logits_RV.shape[-1])
                if adjustment is not None:
                    adjustments[i] = adjustment
            if adjustments:
                part_RV = logits_RV[list(adjustments)].float()
                adjust_logits(part_RV, list(adjustments.values()))
                places += adjustments
                parts.append(part_RV)
        if not places:
            return {}
        params = [
            sampling_row(sampled[i].row.slot.sampling, sampled[i].row.num_known + sampled[i].depth) for i in places
        ]
        tokens_R = sample_rows(self._steps.model, torch.cat(parts), params)
        return dict(zip(places, tokens_R.tolist(), strict=True))

    def _settle(self) -> None:
        """Tell slots and GPU the tokens that count."""
        slots: list[int] = []
        positions: list[int] = []
        newest: list[int] = []
        for row, number, kept in zip(self._rows, self._numbers, self._result.tokens, strict=True):
            if not row.samples:
                continue
            position = row.num_known + len(kept) - 1
            if row.slot.needs_host:
                del row.slot.tokens[row.num_known :]
                row.slot.tokens.extend(kept)
                row.slot.adjustment.rewind(position)
            slots.append(number)
            positions.append(position)
            newest.append(kept[-1])
        self._steps.settle(slots, positions, newest)

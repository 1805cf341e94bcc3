"""A step of the host executor: its rows, and the sampling of their tokens.

A row with a draft samples a token in the place of each of the draft's tokens and one after them, each as if the draft's
tokens before it were the sequence's. It keeps those up to the first that differs from the draft. A token that a grammar
forces is the draft's own: it takes neither logits nor sampling.
"""

from array import array

import torch

from stellarbyte.backends.torch_model import ServedModel
from stellarbyte.forward_batch import ForwardBatch
from stellarbyte.sampling.adjustment import RowAdjustment
from stellarbyte.sampling.sampler import NO_TOKEN
from stellarbyte_server.engine.run.device_errors import device_errors
from stellarbyte_server.engine.run.executor_slot import ExecutorSlot, Row, Sampled, extend_along, is_forced, keep
from stellarbyte_server.engine.run.outputs import add_logprobs, sampling_row
from stellarbyte_server.engine.run.step_plan import Finish, SlotBegin, StepResult, TableChange
from stellarbyte_server.engine.state.block_pool import BlockTable, CacheLayout

# T tokens, C hidden size, R sampled tokens, V vocabulary


class HostSlot(ExecutorSlot):
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
        rows: list[Row[HostSlot]],
        sampled: list[Sampled[HostSlot]],
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
        hidden_RC = self._hidden_TC[self._batch.logits_rows]
        tokens = _forced_tokens(sampled, hidden_RC, finish)
        drawn = [
            i for i, (number, _, depth) in enumerate(sampled) if i not in tokens and not finish.has_end(number, depth)
        ]
        if not drawn:
            self._keep(tokens)
            return
        chosen = [sampled[i] for i in drawn]
        if len(drawn) < len(sampled):
            hidden_RC = hidden_RC[drawn]
        adapters = [(row.slot.begin.adapter_slot, row.slot.begin.adapter_scale) for _, row, _ in chosen]
        logits_RV = self._model.head(hidden_RC, adapters).float()
        scored = [
            place
            for place, (number, row, _) in enumerate(chosen)
            if row.slot.sampling.logprobs is not None and number not in finish.over
        ]
        scored_RV = logits_RV[scored] if scored else None  # before adjustment
        self._adjust(chosen, logits_RV, finish)
        params = [sampling_row(row.slot.sampling, row.num_known + depth) for _, row, depth in chosen]
        tokens |= zip(drawn, self._model.sample(logits_RV, params), strict=True)
        kept = self._keep(tokens)
        if scored_RV is not None:
            entries = [entry for entry, place in enumerate(scored) if drawn[place] in kept]
            scored = [scored[entry] for entry in entries]
            num_top = [chosen[place].row.slot.sampling.logprobs or 0 for place in scored]
            rows = [chosen[place].number for place in scored]
            add_logprobs(self._result, rows, num_top, scored_RV[entries], [tokens[drawn[place]] for place in scored])

    def _adjust(self, chosen: list[Sampled[HostSlot]], logits_RV: torch.Tensor, finish: Finish) -> None:
        """Adjust all logits. A slot has one state of penalties, so its tokens are adjusted one after another, and
        between them it gets the draft's tokens."""
        vocab_size = logits_RV.shape[-1]
        start = 0
        while start < len(chosen):
            depth = chosen[start].depth
            stop = next((i for i in range(start, len(chosen)) if chosen[i].depth > depth), len(chosen))
            adjustments: list[RowAdjustment | None] = []
            for number, row, _ in chosen[start:stop]:
                slot = row.slot
                if depth:
                    extend_along(row, depth)
                is_over = number in finish.over
                mask = finish.mask(number, depth)
                adjustments.append(None if is_over else slot.adjustment.before(slot.tokens, mask, vocab_size))
            self._model.adjust(logits_RV[start:stop], adjustments)
            start = stop

    def _keep(self, tokens: dict[int, int]) -> set[int]:
        """Put what was sampled into the result and the slots, of each row up to the first token that differs from its
        draft; returns the indices in `tokens` of these."""
        kept = keep(self._sampled, tokens, self._result)
        for row, kept_tokens in zip(self._rows, self._result.tokens, strict=True):
            if row.draft:
                row.slot.tokens[row.num_known :] = array("I", kept_tokens)
                row.slot.adjustment.rewind(row.num_known + len(kept_tokens) - 1)
            elif row.samples:
                row.slot.tokens.append(kept_tokens[0])
        return kept


def _forced_tokens(sampled: list[Sampled[HostSlot]], hidden_RC: torch.Tensor, finish: Finish) -> dict[int, int]:
    """The tokens of drafts that a grammar forces, by index in `sampled`; NO_TOKEN after hidden states that are not
    finite."""
    forced = [i for i, each in enumerate(sampled) if is_forced(finish, each)]
    if not forced:
        return {}
    is_finite = hidden_RC[forced].isfinite().all(dim=-1).tolist()
    tokens = [sampled[i].row.draft[sampled[i].depth] for i in forced]
    return {i: token if valid else NO_TOKEN for i, token, valid in zip(forced, tokens, is_finite, strict=True)}

"""Turns scheduled chunks into plans, which contain only changes since the previous plan."""

from collections.abc import Iterable
from itertools import compress
from operator import ne
from typing import NamedTuple

import numpy as np

from stellarbyte_server.engine.run.step_plan import (
    Finish,
    PlannedChunk,
    Rewind,
    SlotBegin,
    StepPlan,
    StepResult,
    TableChange,
    needs_host,
)
from stellarbyte_server.engine.state.sequence import Chunk, Sequence, TokenMask

_NOTHING_NEW = StepPlan()
_NOTHING_TO_SAY = Finish()


class PlannedStep(NamedTuple):
    """A plan, and the mapping of its rows to chunks."""

    plan: StepPlan
    order: list[int] | None  # row → number of its chunk; None: rows are in the order of the chunks
    heeded: list[tuple[int, Sequence]]  # rows with tokens that depend on the host
    drafts: dict[int, tuple[int, ...]] = {}  # noqa: RUF012 - of these rows

    def finish(self) -> Finish:
        """The step's `Finish`; call it when the tokens of all earlier steps are in their sequences."""
        if not self.heeded:
            return _NOTHING_TO_SAY
        masks: dict[int, list[bytes]] = {}
        over: list[int] = []
        for row, sequence in self.heeded:
            if sequence.is_over:
                over.append(row)
            elif sequence.grammar is not None:
                draft = self.drafts.get(row, ())
                skips = bool(draft) and sequence.request.sampling.logprobs is None
                masks[row] = masks_along(sequence.grammar, draft, skips_forced=skips)
        return Finish(masks=masks, over=over)

    def by_chunk(self, result: StepResult) -> StepResult:
        """A result of the plan by chunk instead of row."""
        order = self.order
        if order is None:
            return result
        tokens: list[list[int]] = [[] for _ in order]
        for row, number in enumerate(order):
            tokens[number] = result.tokens[row]
        return StepResult(
            tokens=tokens,
            not_sampled=[order[row] for row in result.not_sampled],
            logprobs={order[row]: found for row, found in result.logprobs.items()},
            prompt_logprobs={order[row]: found for row, found in result.prompt_logprobs.items()},
            pooled={order[row]: pooled for row, pooled in result.pooled.items()},
        )


def masks_along(grammar: TokenMask, draft: tuple[int, ...], *, skips_forced: bool = False) -> list[bytes]:
    """The masks for the tokens in the place of each of a draft's tokens, and after them, up to the first that the
    grammar does not allow, or that completes the answer. The grammar is left as it was.

    `skips_forced`: there is no mask, but b"", in the place of a token that the grammar forces.
    """
    words_W = np.zeros(grammar.num_words, np.uint32)
    masks: list[bytes] = []
    num_accepted = 0
    for place in range(len(draft) + 1):
        token = draft[place] if place < len(draft) else None
        forced = grammar.forced() if skips_forced and token is not None else ()
        if forced and forced[0] == token:
            masks.append(b"")
        else:
            grammar.mask(words_W)
            masks.append(words_W.tobytes())
            if token is None or not _allows(words_W, token):
                break
        grammar.accept(token)
        num_accepted += 1
        if grammar.is_complete or grammar.error is not None:
            break
    if num_accepted:
        grammar.rewind(num_accepted)
    return masks


def _planned(chunk: Chunk, slot: int, *, knows_newest: bool) -> PlannedChunk:
    sequence, start, length, samples, draft = chunk
    newest = sequence.tokens[start + length - len(draft) - 1] if knows_newest and samples else 0
    return PlannedChunk(slot, start, length, samples, draft, newest)


def _allows(words_W: np.ndarray, token: int) -> bool:
    return token // 32 < len(words_W) and bool(words_W[token // 32] >> np.uint32(token % 32) & np.uint32(1))


class _Slot:
    """The executor's knowledge of a sequence."""

    __slots__ = ("decodes", "generation", "is_heeded", "number", "table_changes")

    def __init__(self, number: int, *, is_heeded: bool) -> None:
        self.number = number
        self.is_heeded = is_heeded  # its tokens depend on the host, or more than tokens is requested
        self.generation = -1  # of the block table
        self.table_changes = -1  # of the table when last sent
        self.decodes = False  # the executor has the newest token, and all before it are computed


class Planner:
    """Creates plans. Engine thread only. A plan must be executed, or its sequences recovered, before the next.

    A step with the sequences of the step before costs a few comparisons for each row.
    """

    def __init__(self) -> None:
        self._slots: dict[Sequence, _Slot] = {}
        self._free: list[int] = []
        self._num_slots = 0
        self._ended: list[int] = []  # slots in use in the executor only
        self._decoding: tuple[Sequence, ...] | None = ()  # rows of the last plan; None: not known to the executor
        self._table_changes: list[int] = []  # of these rows' tables
        self._heeded: list[tuple[int, Sequence]] = []  # those of them that depend on the host

    def plan(self, chunks: list[Chunk]) -> PlannedStep:
        """The step for the chunks, at least one."""
        sequences, _, lengths, *_ = zip(*chunks, strict=True)
        if sequences == self._decoding and sum(lengths) == len(chunks):
            table_changes = [sequence.table.changes for sequence in sequences]
            if table_changes == self._table_changes:
                return PlannedStep(_NOTHING_NEW, None, self._heeded)
            changed = list(compress(sequences, map(ne, table_changes, self._table_changes)))
            if not any(self._is_new(sequence) for sequence in changed):
                self._table_changes = table_changes
                tables = [self._table_change(sequence, self._slots[sequence]) for sequence in changed]
                return PlannedStep(StepPlan(tables=tables), None, self._heeded)
        return self._plan_anew(chunks)

    def recover(self, sequences: Iterable[Sequence]) -> None:
        """Recover from a failed plan with these sequences: the next plan sends them anew, and lists the decoding
        ones."""
        self._decoding = None
        for sequence in sequences:
            self._release(sequence)

    def _is_new(self, sequence: Sequence) -> bool:
        """Whether a sequence has more changes than its table's."""
        slot = self._slots.get(sequence)
        return slot is None or slot.generation != sequence.table.generation or sequence.is_rewound

    def _plan_anew(self, chunks: list[Chunk]) -> PlannedStep:
        begins: list[SlotBegin] = []
        rewinds: list[Rewind] = []
        tables: list[TableChange] = []
        slots: list[_Slot] = []
        decodes: list[int] = []  # numbers of chunks
        others: list[int] = []
        has_drafts = any([chunk.draft for chunk in chunks])
        for number, chunk in enumerate(chunks):
            sequence = chunk.sequence
            slot = self._slots.get(sequence)
            if slot is None or slot.generation != sequence.table.generation or sequence.is_rewound:
                slot = self._renew(chunk, slot, begins, rewinds)
            if slot.table_changes != sequence.table.changes:
                tables.append(self._table_change(sequence, slot))
            slots.append(slot)
            if slot.decodes and chunk.length == 1 and not has_drafts:
                decodes.append(number)
            else:
                others.append(number)
                slot.decodes = chunk.samples
        order = decodes + others
        heeded = [
            (row, chunks[number].sequence)
            for row, number in enumerate(order)
            if slots[number].is_heeded and chunks[number].samples
        ]
        decoding = tuple([chunks[number].sequence for number in decodes])
        is_same = decoding == self._decoding
        plan = StepPlan(
            ended=self._ended,
            begins=begins,
            rewinds=rewinds,
            tables=tables,
            decode_slots=None if is_same else [slots[number].number for number in decodes],
            decode_starts=[] if is_same else [chunks[number].start for number in decodes],
            chunks=[_planned(chunks[number], slots[number].number, knows_newest=has_drafts) for number in others],
        )
        self._ended = []
        self._decoding = decoding
        self._table_changes = [sequence.table.changes for sequence in decoding]
        self._heeded = [(row, sequence) for row, sequence in heeded if row < len(decodes)]
        is_in_order = not decodes or decodes[-1] == len(decodes) - 1
        drafts = {row: draft for row, number in enumerate(order) if (draft := chunks[number].draft)}
        return PlannedStep(plan, None if is_in_order else order, heeded, drafts)

    def _renew(self, chunk: Chunk, slot: _Slot | None, begins: list[SlotBegin], rewinds: list[Rewind]) -> _Slot:
        """Send a sequence that is unknown to the executor, or has changed."""
        sequence, sampling = chunk.sequence, chunk.sequence.request.sampling
        is_rewound, sequence.is_rewound = sequence.is_rewound, False
        is_known = slot is not None and slot.generation == sequence.table.generation
        if slot is not None and is_known and is_rewound and chunk.start == len(sequence.tokens) - 1:
            rewinds.append(Rewind(slot.number, len(sequence.tokens), sequence.tokens[-1]))
            slot.decodes = True
            return slot
        has_grammar = sequence.grammar is not None
        if slot is None:
            is_heeded = needs_host(sampling, has_grammar)
            slot = self._slots[sequence] = _Slot(self._take_number(may_release=is_heeded), is_heeded=is_heeded)
        slot.generation, slot.table_changes, slot.decodes = sequence.table.generation, -1, False
        sequence.table.forget_told()
        adapter_start = sequence.adapter_start
        begins.append(
            SlotBegin(
                slot=slot.number,
                token_ids=sequence.tokens.tobytes(),
                num_prompt=sequence.num_prompt,
                adapter_slot=sequence.adapter_slot if adapter_start is not None else 0,
                adapter_scale=sequence.request.adapter_scale,
                adapter_start=0 if adapter_start is None else adapter_start,
                sampling=sampling,
                end_token_ids=tuple(sequence.end_token_ids) if sampling.min_tokens else (),
                has_grammar=has_grammar,
                pooling=sequence.request.pooling,
            )
        )
        return slot

    def _table_change(self, sequence: Sequence, slot: _Slot) -> TableChange:
        slot.table_changes = sequence.table.changes
        return TableChange(slot.number, *sequence.table.take_untold())

    def _take_number(self, *, may_release: bool) -> int:
        """A slot for another sequence. If none is free, or with `may_release` (for sequences with much state), slots of
        ended sequences are freed first."""
        if may_release or not self._free:
            self.release_ended()
        if not self._free:
            self._num_slots += 1
            return self._num_slots
        number = self._free.pop()
        if number in self._ended:  # its next sequence also ends it
            self._ended.remove(number)
        return number

    def release_ended(self) -> None:
        """Free the slots of sequences that do not run; a preempted one gets another later."""
        for sequence in [sequence for sequence in self._slots if not sequence.is_running]:
            self._release(sequence)

    def _release(self, sequence: Sequence) -> None:
        slot = self._slots.pop(sequence, None)
        if slot is not None:
            self._free.append(slot.number)
            self._ended.append(slot.number)

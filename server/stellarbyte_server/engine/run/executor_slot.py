"""A sequence in every executor: the state of its slot, its row of a step, and the sampled tokens that count.

A row with a draft samples a token in the place of each of the draft's tokens and one after them.
"""

from array import array
from typing import Generic, NamedTuple, TypeVar

import torch

from stellarbyte.sampling.sampler import NO_TOKEN
from stellarbyte_server.engine.run.adjustments import SlotAdjustment
from stellarbyte_server.engine.run.outputs import Head, last_logits, pooled_hidden, prompt_logprobs
from stellarbyte_server.engine.run.step_plan import Finish, Rewind, SlotBegin, StepResult

# T tokens of a chunk, C hidden size


class ExecutorSlot:
    """A slot's state, replaced by each `SlotBegin`: a step in flight keeps the one from its start."""

    def __init__(self, begin: SlotBegin, device: torch.device) -> None:
        self.begin = begin
        self.sampling = begin.sampling
        self.tokens = array("I", begin.token_ids)
        self.adjustment = SlotAdjustment(begin, device)

    def rewind(self, rewind: Rewind) -> None:
        """Forget the tokens after the first `num_tokens`."""
        del self.tokens[rewind.num_tokens :]
        self.adjustment.rewind(rewind.num_tokens)

    def num_plain(self, start: int, length: int) -> int:
        """How many of the tokens start..start+length come before the first that has the adapter."""
        return max(0, min(length, self.begin.adapter_start - start))

    @property
    def wants_hidden(self) -> bool:
        """Whether the prompt's hidden states are needed for more than the next token."""
        return self.sampling.prompt_logprobs is not None or self.begin.pooling is not None

    def read_prompt(
        self,
        result: StepResult,
        row: int,
        model: Head,
        start: int,
        chunk_TC: torch.Tensor,
        rows_at_once: int | None = None,
    ) -> None:
        """Add the requested results from a chunk's hidden states; `rows_at_once` is that of `prompt_logprobs`."""
        if self.sampling.prompt_logprobs is not None:
            following = self.tokens[start + 1 : min(start + len(chunk_TC) + 1, self.begin.num_prompt)].tolist()
            num_top = self.sampling.prompt_logprobs
            result.prompt_logprobs[row] = prompt_logprobs(model, chunk_TC, following, num_top, rows_at_once)
        if self.begin.pooling == "logits":
            result.pooled[row] = last_logits(model, chunk_TC)
        elif self.begin.pooling is not None:
            result.pooled[row] = pooled_hidden(self.begin.pooling, chunk_TC)


Slot = TypeVar("Slot", bound=ExecutorSlot)


class Row(NamedTuple, Generic[Slot]):
    """Tokens start..start+length of a sequence."""

    slot: Slot
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


class Sampled(NamedTuple, Generic[Slot]):
    """A token that a step samples."""

    number: int  # of the row
    row: Row[Slot]
    depth: int  # tokens of the row's draft before it


def sampled_tokens(rows: list[Row[Slot]]) -> list[Sampled[Slot]]:
    """The tokens that a step samples, by depth, then by row."""
    sampled = [Sampled(number, row, 0) for number, row in enumerate(rows) if row.samples]
    drafted = [each for each in sampled if each.row.draft]
    depth = 1
    while drafted:
        sampled += [Sampled(number, row, depth) for number, row, _ in drafted]
        depth += 1
        drafted = [each for each in drafted if len(each.row.draft) >= depth]
    return sampled


def extend_along(row: Row[Slot], depth: int) -> None:
    """Let a row's slot have the first `depth` tokens of the draft, of which it may have some."""
    tokens = row.slot.tokens
    tokens.extend(row.draft[len(tokens) - row.num_known : depth])


def is_forced(finish: Finish, each: Sampled[Slot]) -> bool:
    """Whether a grammar forces the token, which is then the draft's."""
    return finish.mask(each.number, each.depth) == b""


def keep(sampled: list[Sampled[Slot]], tokens: dict[int, int], result: StepResult) -> set[int]:
    """Put what was sampled into the result, of each row up to the first token that differs from its draft; returns the
    indices of these.

    Args:
        sampled: of each row by depth.
        tokens: by index in `sampled`; none is as NO_TOKEN.
    """
    kept, over = set[int](), set[int]()
    for i, (number, row, depth) in enumerate(sampled):
        if number in over:
            continue
        token = tokens.get(i, NO_TOKEN)
        if depth and token == NO_TOKEN:
            over.add(number)  # the next step begins here, and finds the same
            continue
        if token == NO_TOKEN:
            result.not_sampled.append(number)
            token = 0  # the sequence ends, but a step ahead still computes it
        kept.add(i)
        result.tokens[number].append(token)
        if depth == len(row.draft) or token != row.draft[depth]:
            over.add(number)
    return kept

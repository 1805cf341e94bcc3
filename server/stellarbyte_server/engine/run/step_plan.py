"""Steps as messages: what an executor computes, what finishes a step, and what it returns.

A slot is a small number from 1 on that names a sequence on the executor's side: the executor keeps tokens, block table
and sampling parameters by slot, so that a plan says only what has changed. Every message can be sent by msgpack. Token
ids and masks are bytes of little-endian uint32.

Rows are the decoding slots of a plan in order, then its chunks.
"""

from typing import Literal

import msgspec

from stellarbyte_server.protocol.messages import TokenLogprob
from stellarbyte_server.protocol.request import SamplingParams


class SlotBegin(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """A slot gets a sequence, or its sequence begins anew; whatever the slot held is forgotten, blocks included."""

    slot: int
    token_ids: bytes  # all tokens of the sequence so far
    num_prompt: int  # how many of them are the prompt
    adapter_slot: int  # of the bank; 0: no adapter
    adapter_scale: float
    sampling: SamplingParams
    end_token_ids: tuple[int, ...]  # banned from the answer's first min_tokens tokens; () if that is 0
    has_grammar: bool  # its masks come with `Finish`
    pooling: Literal["last", "mean"] | None


class Rewind(msgspec.Struct, frozen=True, array_like=True):
    """A slot's sequence is cut to its first tokens; the last of them is computed next."""

    slot: int
    num_tokens: int
    last_token_id: int


class TableChange(msgspec.Struct, frozen=True, array_like=True):
    """A block table after a change: sink blocks and the others are counted separately, freed ones included."""

    slot: int
    first_sink: int  # number of the first of `sink_blocks`; entries from it on are replaced
    sink_blocks: list[int]
    first: int  # number of the first of `blocks`; entries from it on are replaced
    blocks: list[int]
    num_freed: int  # the first blocks after the sinks that are gone: no later query sees them


class PlannedChunk(msgspec.Struct, frozen=True, array_like=True):
    """Tokens start..start+length of a slot's sequence, all of them known to the host."""

    slot: int
    start: int
    length: int
    samples: bool  # the token after them is sampled


class StepPlan(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One step. Parts apply in the order of the fields; plans are executed in the order in which they were made."""

    ended: list[int] = []  # slots that are free again
    begins: list[SlotBegin] = []
    rewinds: list[Rewind] = []
    tables: list[TableChange] = []
    decode_slots: list[int] | None = None
    """Slots that compute the token sampled last for them, which only the executor may know, and sample the next one.
    None: those of the plan before."""
    decode_starts: list[int] = []  # positions of these tokens; empty with None: each is one further
    chunks: list[PlannedChunk] = []


class Finish(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What the host knows of a step's rows only when the results of the step before have been read."""

    masks: dict[int, bytes] = {}  # row with a grammar → bit v % 32 of word v // 32: token v may follow
    over: list[int] = []  # rows whose sequences have ended: their results are dropped


class StepResult(msgspec.Struct, array_like=True, kw_only=True):
    """What a step computed, by row; rows are in the dictionaries if their requests ask for that."""

    tokens: list[list[int]]  # those sampled; none for a row that does not sample
    not_sampled: list[int] = []  # rows of which nothing could be sampled: their numbers are not finite
    logprobs: dict[int, list[TokenLogprob]] = {}  # of these tokens
    prompt_logprobs: dict[int, list[TokenLogprob]] = {}  # of the prompt's tokens after the chunk's first one
    pooled: dict[int, bytes] = {}  # float32 [C]: sum of the chunk's hidden states, or the last one


def adjusts(sampling: SamplingParams, has_grammar: bool) -> bool:
    """Whether logits are changed before tokens are sampled, now or at another token."""
    return (
        has_grammar
        or bool(sampling.logit_bias)
        or sampling.min_tokens > 0
        or sampling.repetition_penalty != 1
        or bool(sampling.presence_penalty or sampling.frequency_penalty)
    )


def needs_host(sampling: SamplingParams, has_grammar: bool) -> bool:
    """Whether the host has a say in a sequence's tokens, or wants more than the tokens."""
    return adjusts(sampling, has_grammar) or sampling.logprobs is not None

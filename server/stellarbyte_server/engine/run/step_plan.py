"""Messages of a step: the plan for an executor, the finish, and the result.

A slot is a small number, from 1, of a sequence in the executor, which stores tokens, block table and sampling
parameters by slot, so that a plan contains only changes. Every message can be sent by msgpack. Token ids and masks are
bytes of little-endian uint32.

Rows are the decoding slots of a plan in order, then its chunks.
"""

from typing import Literal

import msgspec

from stellarbyte_server.protocol.messages import TokenLogprob
from stellarbyte_server.protocol.request import SamplingParams


class SlotBegin(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Assign a sequence to a slot, or restart its sequence; the slot's earlier state and blocks are forgotten."""

    slot: int
    token_ids: bytes  # all tokens of the sequence so far
    num_prompt: int  # tokens of the prompt
    adapter_slot: int  # of the bank; 0: no adapter
    adapter_scale: float
    adapter_start: int  # position of the first token that has the adapter
    sampling: SamplingParams
    end_token_ids: tuple[int, ...]  # banned from the answer's first min_tokens tokens; () if that is 0
    has_grammar: bool  # its masks come with `Finish`
    pooling: Literal["last", "mean", "logits"] | None


class Rewind(msgspec.Struct, frozen=True, array_like=True):
    """Cut a slot's sequence to its first tokens; the last of them is computed next."""

    slot: int
    num_tokens: int
    last_token_id: int


class TableChange(msgspec.Struct, frozen=True, array_like=True):
    """Changes of a block table. Sink blocks and others are numbered separately, including freed ones."""

    slot: int
    first_sink: int  # number of the first of `sink_blocks`; entries from it on are replaced
    sink_blocks: list[int]
    first: int  # number of the first of `blocks`; entries from it on are replaced
    blocks: list[int]
    num_freed: int  # freed blocks at the start after the sinks: no later query sees them


class PlannedChunk(msgspec.Struct, frozen=True, array_like=True):
    """Tokens start..start+length of a slot's sequence, all of them known to the host.

    The last ones may be a draft: guesses, of which the step keeps those that it would have sampled, up to the first
    that differs, and the token sampled in its place, or after all of them. Only for executors that take drafts, and
    not while another step is in flight; the plan has no decoding slots then, but chunks of one token.
    """

    slot: int
    start: int
    length: int
    samples: bool  # sample the token after them
    draft: tuple[int, ...] = ()  # the last of these tokens
    newest_token_id: int = 0  # the one before the draft; only in plans with drafts, of chunks that sample


class StepPlan(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One step. Its parts apply in the order of the fields; plans are executed in the order of their creation."""

    ended: list[int] = []  # freed slots
    begins: list[SlotBegin] = []
    rewinds: list[Rewind] = []
    tables: list[TableChange] = []
    decode_slots: list[int] | None = None
    """Slots that compute their last sampled token, which only the executor may know, and sample the next one.
    None: as in the plan before."""
    decode_starts: list[int] = []  # positions of these tokens; empty with None: each advances by one
    chunks: list[PlannedChunk] = []


class Finish(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """The inputs of a step that depend on the results of the step before."""

    masks: dict[int, list[bytes]] = {}
    """Row with a grammar → its mask: bit v % 32 of word v // 32 says whether token v is allowed. With a draft: a mask
    for the place of each of its tokens, b"" if the grammar forces the token, which is not sampled then, and one for the
    token after them. Where the list ends, nothing is sampled."""
    over: list[int] = []  # rows of ended sequences, whose results are dropped

    def mask(self, row: int, depth: int = 0) -> bytes | None:
        """The mask for the token of a row after `depth` tokens of its draft; None: there is none."""
        masks = self.masks.get(row, ())
        return masks[depth] if depth < len(masks) else None

    def has_end(self, row: int, depth: int) -> bool:
        """Whether a grammar has ended before that token, which is not sampled then."""
        return row in self.masks and depth >= len(self.masks[row])


class StepResult(msgspec.Struct, array_like=True, kw_only=True):
    """A step's results by row; dictionaries have only the rows that request them."""

    tokens: list[list[int]]  # sampled tokens; none for a row that does not sample
    not_sampled: list[int] = []  # rows without a valid token: NaN or infinity
    logprobs: dict[int, list[TokenLogprob]] = {}  # of these tokens
    prompt_logprobs: dict[int, list[TokenLogprob]] = {}  # of the prompt's tokens after the chunk's first one
    pooled: dict[int, bytes] = {}  # float32 [C]: sum of the chunk's hidden states, or the last one; or [V] logits


def adjusts(sampling: SamplingParams, has_grammar: bool) -> bool:
    """Whether logits of any token are adjusted."""
    return (
        has_grammar
        or bool(sampling.logit_bias)
        or sampling.min_tokens > 0
        or sampling.repetition_penalty != 1
        or bool(sampling.presence_penalty or sampling.frequency_penalty)
    )


def needs_host(sampling: SamplingParams, has_grammar: bool) -> bool:
    """Whether a sequence's tokens depend on the host, or the host needs more than the tokens."""
    return adjusts(sampling, has_grammar) or sampling.logprobs is not None

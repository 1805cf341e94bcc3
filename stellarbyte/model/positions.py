"""Where the tokens of a forward stand: in their sequences or documents, and relative to each other."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from stellarbyte.cache.memory import Memory
from stellarbyte.cache.relative import RelativeCache

# B sequences, T queries, S keys


class Places(NamedTuple):
    """Of some tokens, queries or keys.

    Attributes:
        position_BT: in the token's sequence or document; -1 for padding.
        turn_BT: by which the token is rotated. Within one sequence or document, differences are those of positions.
        document_BT: number of the token's document in its row; None: a row is one sequence.
    """

    position_BT: torch.Tensor
    turn_BT: torch.Tensor
    document_BT: torch.Tensor | None = None

    def between(self, start: int, stop: int) -> "Places":
        """The tokens of these columns."""
        document_BT = None if self.document_BT is None else self.document_BT[:, start:stop]
        return Places(self.position_BT[:, start:stop], self.turn_BT[:, start:stop], document_BT)


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Of the T tokens of one forward.

    Attributes:
        has_padding: whether some position may be -1.
        are_consecutive: whether every row holds the positions 0 to T-1 of one sequence.
        limit: no position and no difference of turns within a row exceeds it.
        is_token_BT: false where a row is padded; None: nowhere.
    """

    places: Places
    has_padding: bool = False
    are_consecutive: bool = False
    limit: int
    is_token_BT: torch.Tensor | None = None


def positions_of(
    embeddings: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    document_ids: torch.Tensor | None,
    *,
    cache: RelativeCache | None,
    memory: Memory | None,
    context: int,
) -> Positions:
    """Of the tokens of `embeddings` [B, T, hidden], from the arguments of `ByteTransformer.forward`.

    Args:
        memory: that this forward reads; a cache may have one that an earlier forward has read.
        context: tokens of the longest sequence. A compiled forward takes it for the limit of given positions: it cannot
            look at their values without dividing its graph.

    Raises:
        ValueError: arguments do not fit each other.
    """
    (batch, length), device = embeddings.shape[:2], embeddings.device
    seen = 0 if cache is None else cache.get_seq_length()
    start = cache.start if cache is not None else 0 if memory is None else memory.next_position
    remembers = memory is not None or (cache is not None and cache.memory is not None)
    if document_ids is not None:
        if attention_mask is not None or cache is not None or remembers:
            raise ValueError("document_ids take neither attention_mask (pad with a negative id), cache nor memory")
        return _packed(document_ids, position_ids)
    has_padding = False
    if attention_mask is not None:
        if attention_mask.shape != (batch, seen + length):
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}, expected {[batch, seen + length]} "
                "(tokens already in the cache count)"
            )
        has_padding = torch.compiler.is_compiling() or not bool(attention_mask.all())
    if has_padding and remembers:
        raise ValueError("attention_mask marks padding, which a memory cannot hold: give rows of one length")
    is_token_BT = None
    if has_padding:
        assert attention_mask is not None
        is_token_BT = attention_mask[:, -length:] != 0
        counted = attention_mask.long().cumsum(-1) - 1 if position_ids is None else position_ids
        position_BT = counted[:, -length:].masked_fill(~is_token_BT, -1)
    elif position_ids is not None:
        position_BT = start + position_ids.expand(batch, -1)
    else:
        position_BT = torch.arange(start + seen, start + seen + length, device=device).expand(batch, -1)
    limit = start + seen + length - 1
    if position_ids is not None:
        limit = max(limit, context - 1) if torch.compiler.is_compiling() else int(position_BT.max())
    return Positions(
        places=Places(position_BT, position_BT),
        has_padding=has_padding,
        are_consecutive=not has_padding and position_ids is None and cache is None and memory is None,
        limit=max(limit, 0),
        is_token_BT=is_token_BT,
    )


def _packed(document_ids: torch.Tensor, position_ids: torch.Tensor | None) -> Positions:
    """Rows of several documents, one after the other; each run of one id is a document, of a negative id padding.

    Args:
        document_ids: [B, T] integers.
        position_ids: [B, T], which must count from the start of each document, from a number of the row's own; None:
            from 0. It turns all tokens of the row alike, which changes no score.
    """
    batch, length = document_ids.shape
    index_BT = torch.arange(length, device=document_ids.device).expand(batch, -1)
    starts_BT = document_starts(document_ids)
    first_BT = torch.where(starts_BT, index_BT, 0).cummax(dim=-1).values
    position_BT, turn_BT = index_BT - first_BT, index_BT
    if position_ids is not None:
        shift_B1 = position_ids[:, :1]
        torch._assert_async(  # raises without waiting for the device
            ((position_ids - shift_B1 == position_BT) | (document_ids < 0)).all(),
            "position_ids must count from the first number of their row at the start of each document of document_ids",
        )
        turn_BT = index_BT + shift_B1
    return Positions(
        places=Places(position_BT, turn_BT, starts_BT.cumsum(dim=-1)),
        limit=length - 1,
        is_token_BT=document_ids >= 0,
    )


def document_starts(document_ids: torch.Tensor) -> torch.Tensor:
    """[B, T] true at the first token of each document."""
    changed = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.cat((torch.ones_like(document_ids[:, :1], dtype=torch.bool), changed), dim=1)

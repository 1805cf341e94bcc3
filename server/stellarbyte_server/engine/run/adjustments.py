"""What sequences ask to be done to their logits, kept while they run. Knows no sampling and no kernels."""

from collections.abc import Iterable

import numpy as np
import torch

from stellarbyte.sampling.adjustment import LogitAdjustment, RowAdjustment
from stellarbyte_server.engine.state.sequence import Sequence


class Adjustments:
    """A runner's; engine thread only. What a sequence's penalties hold takes 8 bytes a token of the vocabulary."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[Sequence, LogitAdjustment] = {}

    def of(self, sequence: Sequence, vocab_size: int) -> RowAdjustment | None:
        """What is done before its next token is sampled, the last one in `tokens` being known; None: nothing."""
        if not adjusts(sequence):
            return None
        adjustment = self._made.get(sequence)
        if adjustment is None:
            adjustment = self._make(sequence, vocab_size)
        allowed_W = None
        if sequence.grammar is not None:
            allowed_W = np.zeros(-(-vocab_size // 32), np.uint32)
            sequence.grammar.mask(allowed_W)
        bans = sequence.num_generated < sequence.request.sampling.min_tokens
        return adjustment.before(sequence.tokens, allowed_W, bans=bans)

    def forget(self, sequences: Iterable[Sequence]) -> None:
        """Begin anew with them: a step failed, and how far it got is not known."""
        for sequence in sequences:
            self._made.pop(sequence, None)

    def _make(self, sequence: Sequence, vocab_size: int) -> LogitAdjustment:
        self.forget([other for other in self._made if not other.is_running])
        sampling = sequence.request.sampling
        banned = sequence.end_token_ids if sampling.min_tokens else ()
        adjustment = self._made[sequence] = LogitAdjustment(
            vocab_size,
            self._device,
            banned=[token_id for token_id in banned if token_id < vocab_size],
            bias=sampling.logit_bias,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            num_prompt=sequence.num_prompt,
        )
        return adjustment


def adjusts(sequence: Sequence) -> bool:
    """Whether its request or its grammar changes logits, now or at another token."""
    sampling = sequence.request.sampling
    return (
        sequence.grammar is not None
        or bool(sampling.logit_bias)
        or sampling.min_tokens > 0
        or sampling.repetition_penalty != 1
        or bool(sampling.presence_penalty or sampling.frequency_penalty)
    )

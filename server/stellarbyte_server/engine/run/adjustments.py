"""The logit adjustments of a slot's sequence, kept from token to token."""

from array import array

import numpy as np
import torch

from stellarbyte.sampling.adjustment import LogitAdjustment, RowAdjustment
from stellarbyte_server.engine.run.step_plan import SlotBegin, adjusts


class SlotAdjustment:
    """A slot's adjustment, created on first use. Penalties take 8 bytes for each token of the vocabulary."""

    def __init__(self, begin: SlotBegin, device: torch.device) -> None:
        self._begin = begin
        self._device = device
        self._adjusts = adjusts(begin.sampling, begin.has_grammar)
        self._made: LogitAdjustment | None = None

    def before(self, tokens: "array[int]", mask: bytes | None, vocab_size: int) -> RowAdjustment | None:
        """The adjustment for the token after `tokens`, prompt and answer; None: none.

        `mask` is the grammar's; required with a grammar.
        """
        if not self._adjusts:
            return None
        if self._made is None:
            self._made = self._make(vocab_size)
        allowed_W = None if mask is None else np.frombuffer(bytearray(mask), np.uint32)
        bans = len(tokens) - self._begin.num_prompt < self._begin.sampling.min_tokens
        return self._made.before(tokens, allowed_W, bans=bans)

    def rewind(self, num_tokens: int) -> None:
        """Forget tokens after the first `num_tokens`."""
        if self._made is not None:
            self._made.rewind(num_tokens)

    def _make(self, vocab_size: int) -> LogitAdjustment:
        sampling = self._begin.sampling
        return LogitAdjustment(
            vocab_size,
            self._device,
            banned=[token_id for token_id in self._begin.end_token_ids if token_id < vocab_size],
            bias=sampling.logit_bias,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            num_prompt=self._begin.num_prompt,
        )

"""Changes of logits before sampling: grammars, bans, biases and penalties.

The reference of `ops/cpu/adjustment.py`. The order is that of the numerics: tokens that the grammar allows, without the
banned ones, then bias, then penalties.
"""

import functools
from array import array
from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

# R rows, K rows computed together, V vocabulary, W words of 32 tokens

MOST_UNDONE = 64  # tokens that a rewind takes back one by one; after more, all are counted again
_ROWS_TOGETHER = 32  # bounds temporary memory: more rows of a large vocabulary take hundreds of megabytes


class LogitAdjustment:
    """The adjustment of one sequence's logits, updated by token: the cost of a token does not depend on the length.

    Args:
        device: of the logits.
        banned: tokens that `before` can ban; if the ban would leave no token, it is not applied.
        bias: token id and the number added to its logit; no id twice.
        repetition_penalty: divides positive logits, and multiplies negative ones, of all tokens of the sequence.
        presence_penalty: subtracted from the logits of tokens that occur after the first `num_prompt`.
        frequency_penalty: the same, for each occurrence.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device,
        *,
        banned: Sequence[int] = (),
        bias: Sequence[tuple[int, float]] = (),
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        num_prompt: int = 0,
    ) -> None:
        self._without_banned_W = _words(vocab_size, banned) if banned else None
        self.bias_ids: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        if bias:
            ids, values = zip(*bias, strict=True)
            self.bias_ids = torch.tensor(ids, device=device)
            self.bias = torch.tensor(values, dtype=torch.float32, device=device)
        self._repetition = repetition_penalty
        self._presence, self._frequency = presence_penalty, frequency_penalty
        self.divisor_V: torch.Tensor | None = None
        self.deduction_V: torch.Tensor | None = None
        if repetition_penalty != 1:
            self.divisor_V = torch.ones(vocab_size, device=device)
        if presence_penalty or frequency_penalty:
            self.deduction_V = torch.zeros(vocab_size, device=device)
        self._num_prompt = num_prompt
        self._num_counted = 0  # tokens that the penalties include
        self._last = -1  # the last of them
        self._occurrences: Counter[int] = Counter()  # in the answer
        self._seen: set[int] = set()  # tokens with a divisor
        self._newest: deque[tuple[int, int, bool]] = deque(maxlen=MOST_UNDONE)
        """The answer's tokens that were counted one by one: the token before, the token, whether it was new."""

    def before(
        self, tokens: "array[int]", allowed_W: np.ndarray | None = None, *, bans: bool = False
    ) -> "RowAdjustment":
        """The adjustment for the token after `tokens`.

        Args:
            tokens: the sequence so far, prompt first.
            allowed_W: uint32, bit v % 32 of word v // 32 says whether token v is allowed; None: all are.
            bans: apply the ban.
        """
        if self.divisor_V is not None or self.deduction_V is not None:
            self._count(tokens)
        if bans and self._without_banned_W is not None:
            left_W = self._without_banned_W if allowed_W is None else allowed_W & self._without_banned_W
            allowed_W = left_W if left_W.any() else allowed_W
        return RowAdjustment(self, allowed_W)

    def rewind(self, num_tokens: int) -> None:
        """Forget the counts of tokens after the first `num_tokens`: the sequence was cut there."""
        count = self._num_counted - num_tokens
        if count > len(self._newest):
            self._forget()
            return
        for _ in range(count):
            self._last, token, is_new = self._newest.pop()
            self._num_counted -= 1
            if self.divisor_V is not None and is_new:
                self._seen.discard(token)
                self.divisor_V[token] = 1
            if self.deduction_V is not None:
                self._occurrences[token] -= 1
                self.deduction_V[token] = self._deduction(token)

    def _count(self, tokens: "array[int]") -> None:
        """Count the tokens since the last call; all of them if the sequence differs or is shorter."""
        counted = self._num_counted
        if len(tokens) < counted or (counted and tokens[counted - 1] != self._last):
            self._forget()
            counted = self._num_counted
        new = tokens[counted:]
        if not new:
            return
        answer = new[max(0, self._num_prompt - counted) :]
        if len(new) == len(answer) <= MOST_UNDONE:
            for before, token in zip([self._last, *new], new, strict=False):
                self._newest.append((before, token, token not in self._seen))
                self._seen.add(token)
        else:
            self._newest.clear()
        self._num_counted, self._last = len(tokens), tokens[-1]
        if self.divisor_V is not None:
            self._seen.update(new)
            _put(self.divisor_V, new, self._repetition)
        if self.deduction_V is not None and answer:
            self._occurrences.update(answer)
            changed = list(set(answer)) if len(answer) > 1 else answer
            _put(self.deduction_V, changed, [self._deduction(token) for token in changed])

    def _deduction(self, token: int) -> float:
        """What is subtracted from a token's logit."""
        count = self._occurrences[token]
        return self._presence + self._frequency * count if count else 0.0

    def _forget(self) -> None:
        self._num_counted = 0
        self._occurrences.clear()
        self._seen.clear()
        self._newest.clear()
        if self.divisor_V is not None:
            self.divisor_V.fill_(1)
        if self.deduction_V is not None:
            self.deduction_V.zero_()


class RowAdjustment(NamedTuple):
    """The adjustment of one row of logits for one token."""

    adjustment: LogitAdjustment
    allowed_W: np.ndarray | None


def adjust_logits(logits_RV: torch.Tensor, rows: Sequence[RowAdjustment | None]) -> None:
    """Change each row of float32 logits, in place, by its adjustment; rows without one do not change."""
    for start in range(0, len(rows), _ROWS_TOGETHER):
        group = rows[start : start + _ROWS_TOGETHER]
        if any(group):
            _adjust(logits_RV[start : start + _ROWS_TOGETHER], group)


def _adjust(logits_KV: torch.Tensor, rows: Sequence[RowAdjustment | None]) -> None:
    device, vocab_size = logits_KV.device, logits_KV.shape[1]
    masks = [None if row is None else row.allowed_W for row in rows]
    if any(mask_W is not None for mask_W in masks):
        any_W = _words(vocab_size)
        words_KW = np.stack([any_W if mask_W is None else mask_W for mask_W in masks])
        logits_KV.masked_fill_(_forbidden(words_KW, vocab_size, device), float("-inf"))
    adjustments = [None if row is None else row.adjustment for row in rows]
    for logits_V, adjustment in zip(logits_KV, adjustments, strict=True):
        if adjustment is not None and adjustment.bias_ids is not None and adjustment.bias is not None:
            logits_V.index_add_(0, adjustment.bias_ids, adjustment.bias)
    divisors = [None if adjustment is None else adjustment.divisor_V for adjustment in adjustments]
    if any(divisor_V is not None for divisor_V in divisors):
        divisor_KV = _stack(divisors, torch.ones((), device=device).expand(vocab_size))
        torch.where(logits_KV > 0, logits_KV / divisor_KV, logits_KV * divisor_KV, out=logits_KV)
    deductions = [None if adjustment is None else adjustment.deduction_V for adjustment in adjustments]
    if any(deduction_V is not None for deduction_V in deductions):
        logits_KV.sub_(_stack(deductions, torch.zeros((), device=device).expand(vocab_size)))


def _stack(rows: list[torch.Tensor | None], neutral_V: torch.Tensor) -> torch.Tensor:
    """[K, V]; the neutral row where a row is None."""
    return torch.stack([neutral_V if row_V is None else row_V for row_V in rows])


def _put(numbers_V: torch.Tensor, ids: "array[int] | list[int]", values: float | list[float]) -> None:
    """Set the numbers of some tokens; for one token, the usual case in decoding, without an upload."""
    if len(ids) == 1:
        numbers_V[ids[0]] = values if isinstance(values, float) else values[0]
        return
    index = torch.from_numpy(np.array(ids).astype(np.int64)).to(numbers_V.device)
    numbers_V[index] = torch.tensor(values, dtype=numbers_V.dtype, device=numbers_V.device)


def _words(vocab_size: int, without: Sequence[int] = ()) -> np.ndarray:
    """Bits of all tokens except `without`, uint32 [W]."""
    bits_V = np.ones(vocab_size, np.uint8)
    bits_V[list(without)] = 0
    packed = np.packbits(bits_V, bitorder="little")
    return np.pad(packed, (0, -len(packed) % 4)).view(np.uint32)


def _forbidden(words_KW: np.ndarray, vocab_size: int, device: torch.device) -> torch.Tensor:
    """[K, V] booleans: the bits that are not set."""
    bytes_B = torch.from_numpy(words_KW.view(np.uint8).reshape(-1)).to(device)
    clear_8B = _clear_bits(device)[bytes_B.int()].view(torch.bool)
    return clear_8B.view(len(words_KW), -1)[:, :vocab_size]


@functools.lru_cache(maxsize=8)
def _clear_bits(device: torch.device) -> torch.Tensor:
    """For each byte its eight bits, least significant first, as booleans, true where a bit is 0: int64 [256]."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy((1 - bits).view(np.int64)[:, 0].copy()).to(device)

"""Choosing the next token of many sequences at once.

The order is that of the numerics: temperature, top_k, top_p, min_p, then the Gumbel-max rule with noise from a
counter-based generator, so that a seeded request draws the same noise in any batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# R rows, V vocabulary

NO_TOKEN = -1  # of a row without a valid token: its largest logit is NaN or infinite
UINT32 = 0xFFFFFFFF
UINT64 = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class RowSampling:
    """Sampling parameters of one row. `position`: number of tokens in the sequence before the new one."""

    temperature: float
    top_k: int  # 0: all
    top_p: float
    min_p: float
    seed: int
    choice: int
    position: int


GREEDY = RowSampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, choice=0, position=0)


def sample(logits_RV: torch.Tensor, rows: Sequence[RowSampling]) -> torch.Tensor:
    """One token id for each row, int64 [R] on the logits' device; NO_TOKEN where the row has NaN, +inf or only -inf.

    Temperature 0 takes the likeliest token, the lowest id on ties; only the other rows pay for sampling.
    """
    best_R1 = logits_RV.amax(dim=-1, keepdim=True)  # NaN if one of them is
    tokens = _first_at(logits_RV, best_R1)
    random = [i for i, row in enumerate(rows) if row.temperature > 0]
    if random:
        index = torch.tensor(random, device=logits_RV.device)
        chosen = [rows[i] for i in random]
        tokens[index] = _sample_random(logits_RV[index].float(), chosen)
    return tokens.masked_fill_(~best_R1[:, 0].isfinite(), NO_TOKEN)


def _first_at(logits_RV: torch.Tensor, best_R1: torch.Tensor) -> torch.Tensor:
    """argmax with the lowest id on ties (torch's own leaves ties open)."""
    ids = torch.arange(logits_RV.shape[-1], device=logits_RV.device)
    return torch.where(logits_RV == best_R1, ids, logits_RV.shape[-1] - 1).amin(dim=-1)


def _sample_random(logits_RV: torch.Tensor, rows: list[RowSampling]) -> torch.Tensor:
    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits_RV.device)[:, None]

    temperature = column([row.temperature for row in rows])
    # Subtracting the maximum first keeps a tiny temperature from overflowing.
    logits_RV = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)) / temperature
    if any(row.top_k for row in rows):
        keep_top_k(logits_RV, [row.top_k for row in rows])
    if any(row.top_p < 1 for row in rows):
        keep_top_p(logits_RV, column([row.top_p for row in rows]))
    if any(row.min_p > 0 for row in rows):
        probabilities = logits_RV.softmax(dim=-1)
        least = probabilities.amax(dim=-1, keepdim=True) * column([row.min_p for row in rows])
        logits_RV.masked_fill_(probabilities < least, float("-inf"))
    return (logits_RV + gumbel_noise(rows, logits_RV.shape[-1], logits_RV.device)).argmax(dim=-1)


def keep_top_k(logits_RV: torch.Tensor, top_k: list[int]) -> None:
    """Set all but each row's k largest to -inf, in place; ties with the k-th stay. 0 keeps the row."""
    vocabulary = logits_RV.shape[-1]
    counts = [min(k, vocabulary) if k else vocabulary for k in top_k]
    limited = [i for i, count in enumerate(counts) if count < vocabulary]
    if not limited:
        return
    index = torch.tensor(limited, device=logits_RV.device)
    largest = logits_RV[index].topk(max(counts[i] for i in limited), dim=-1).values
    last = torch.tensor([counts[i] - 1 for i in limited], device=logits_RV.device)[:, None]
    threshold = largest.gather(-1, last)
    logits_RV[index] = logits_RV[index].masked_fill(logits_RV[index] < threshold, float("-inf"))


def keep_top_p(logits_RV: torch.Tensor, top_p_R1: torch.Tensor) -> None:
    """Set to -inf, in place, all but the likeliest tokens whose probabilities first add up to top_p.

    A token stays if those strictly likelier than it add up to less than top_p, so ties with the last one stay; the
    likeliest always stays.
    """
    ordered = logits_RV.sort(dim=-1, descending=True).values
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    drop = (before >= top_p_R1) & (top_p_R1 < 1)
    drop[:, 0] = False
    # Of equal tokens the first in order has only likelier ones before it: where it stays, all of them do.
    least = ordered.masked_fill(drop, float("inf")).amin(dim=-1, keepdim=True)
    logits_RV.masked_fill_(logits_RV < least, float("-inf"))


def gumbel_noise(rows: Sequence[RowSampling], vocabulary: int, device: torch.device) -> torch.Tensor:
    """Standard Gumbel numbers [R, V] float32, a pure function of (seed, choice, position, token id)."""
    keys = torch.tensor([row_key(row) for row in rows], dtype=torch.int64, device=device)
    ids = torch.arange(vocabulary, dtype=torch.int64, device=device)
    bits = _mix32(_mix32(ids ^ keys[:, :1]) ^ keys[:, 1:])
    # -log(-log u) with u = 1 - v: log1p keeps the winners' small exponentials exact in float32.
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)  # rounding must not reach 1
    return -torch.log(-torch.log1p(-uniform))


def row_key(row: RowSampling) -> tuple[int, int]:
    """Two 32-bit keys from a row's counters, by splitmix64 (Steele et al. 2014)."""
    state = _splitmix64((choice_state(row.seed, row.choice) ^ row.position) & UINT64)
    return state & UINT32, state >> 32


def choice_state(seed: int, choice: int) -> int:
    """The 64 bits that all positions of one choice share; kernels combine them with the position."""
    return _splitmix64((_splitmix64(seed & UINT64) ^ choice) & UINT64)


def _splitmix64(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & UINT64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & UINT64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & UINT64
    return x ^ (x >> 31)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """A full-avalanche hash of 32-bit numbers held in int64 (murmur3's finaliser)."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & UINT32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & UINT32
    return x ^ (x >> 16)

"""The prompt tokens of a step, packed into one array for the GPU."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from stellarbyte.backends.gpu.slots import Integers
from stellarbyte.ops.triton.attention import TILE_ROWS
from stellarbyte.ops.triton.lora import PROMPT_SEGMENT_ROWS, LoraRows

# T tokens, X tiles, R rows that sample, S segments

_TOKEN_COUNTS = (16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
_SAMPLE_COUNTS = (0, 1, 8)
_SPARE_PARTS = (1, 8, 64)  # extra tiles or segments, for sequences that do not fill their last one
MAX_PADDED_TOKENS = _TOKEN_COUNTS[-1]
MAX_PADDED_SAMPLES = _SAMPLE_COUNTS[-1]
_VERIFIED_COUNTS = (16, 32, 64, 96)
_VERIFIED_SEGMENTS = (1, 16)
MAX_VERIFIED_TOKENS = _VERIFIED_COUNTS[-1]
ODD_TOKENS = 2065  # of unpadded prompts: not a multiple of 16, for which kernels are compiled separately
_FEWER_ODD_TOKENS = 1041  # with adapters: so few that programs share a segment (`lora.shrink`)
_ALIGNMENT = 4  # numbers: a kernel is compiled once more for pointers that 16 bytes do not divide


@dataclass(kw_only=True)
class Prompts:
    """Tokens of prompts, sequence after sequence, on the host. `slots` are those of `slots.SlotMemory`."""

    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    tile_starts: list[int] = field(default_factory=list)
    tile_counts: list[int] = field(default_factory=list)
    sample_rows: list[int] = field(default_factory=list)  # tokens that need logits
    sample_slots: list[int] = field(default_factory=list)
    sample_positions: list[int] = field(default_factory=list)  # of the sampled tokens
    segment_starts: list[int] = field(default_factory=list)
    segment_counts: list[int] = field(default_factory=list)
    segment_slots: list[int] = field(default_factory=list)  # in the bank
    scales: list[float] = field(default_factory=list)  # of every token
    sample_bank_slots: list[int] = field(default_factory=list)

    def add(
        self,
        token_ids: list[int],
        first_position: int,
        slot: int,
        *,
        num_samples: int,
        bank_slot: int,
        scale: float,
        num_plain: int = 0,
    ) -> None:
        """Add tokens of one sequence, starting at a position.

        Args:
            num_samples: sample the token after each of so many of the last ones.
            bank_slot: of the sequence's adapter; 0: none.
            num_plain: the first of these tokens, which the adapter does not change.
        """
        start, count = len(self.token_ids), len(token_ids)
        self.token_ids += token_ids
        self.positions += range(first_position, first_position + count)
        self.slots += [slot] * count
        bank_slot = bank_slot if num_plain < count else 0
        first_adapted = num_plain if bank_slot else count
        self.scales += [0.0] * first_adapted + [scale] * (count - first_adapted)
        for first in range(0, count, TILE_ROWS):
            self.tile_starts.append(start + first)
            self.tile_counts.append(min(TILE_ROWS, count - first))
        for first in range(first_adapted, count, PROMPT_SEGMENT_ROWS):
            self.segment_starts.append(start + first)
            self.segment_counts.append(min(PROMPT_SEGMENT_ROWS, count - first))
            self.segment_slots.append(bank_slot)
        first_sampled = count - num_samples
        self.sample_rows += range(start + first_sampled, start + count)
        self.sample_slots += [slot] * num_samples
        self.sample_positions += range(first_position + first_sampled + 1, first_position + count + 1)
        self.sample_bank_slots += [bank_slot] * num_samples


class PromptTensors(NamedTuple):
    """The same on the device. Padding rows use slot 0, which no sequence has."""

    token_ids_T: torch.Tensor
    positions_T: torch.Tensor
    slots_T: torch.Tensor
    tile_starts_X: torch.Tensor
    tile_counts_X: torch.Tensor
    sample_rows_R: torch.Tensor
    sample_slots_R: torch.Tensor
    sample_positions_R: torch.Tensor
    adapters: LoraRows | None
    sample_bank_slots_R: torch.Tensor | None  # None without adapters

    def sample_adapters(self, segment_rows: int) -> LoraRows:
        """The adapters of the rows that sample; each row is a segment, in a tile of `segment_rows`."""
        assert self.adapters is not None and self.sample_bank_slots_R is not None
        slots_R = self.sample_bank_slots_R
        starts_R = torch.arange(len(slots_R), dtype=torch.int32, device=slots_R.device)
        scales_R = self.adapters.scales_T[self.sample_rows_R]
        return LoraRows(starts_R, torch.ones_like(starts_R), slots_R, scales_R, segment_rows)


class PromptShape(NamedTuple):
    """Lengths of the arrays, and so their offsets in the packed array."""

    tokens: int
    tiles: int
    samples: int
    segments: int  # 0: no token has an adapter

    def pack(self, prompts: Prompts) -> Integers:
        """One array of all the prompts' numbers, each part padded with zeros."""
        parts: list[tuple[list[int] | Integers, int]] = [
            (prompts.token_ids, self.tokens),
            (prompts.positions, self.tokens),
            (prompts.slots, self.tokens),
            (prompts.tile_starts, self.tiles),
            (prompts.tile_counts, self.tiles),
            (prompts.sample_rows, self.samples),
            (prompts.sample_slots, self.samples),
            (prompts.sample_positions, self.samples),
        ]
        if self.segments:
            parts += [
                (prompts.segment_starts, self.segments),
                (prompts.segment_counts, self.segments),
                (prompts.segment_slots, self.segments),
            ]
            parts.append((np.array(prompts.scales, np.float32).view(np.int32), self.tokens))
            parts.append((prompts.sample_bank_slots, self.samples))
        packed = np.zeros(sum(_aligned(size) for _, size in parts), np.int32)
        start = 0
        for values, size in parts:
            packed[start : start + len(values)] = values
            start += _aligned(size)
        return packed

    def unpack(self, packed: torch.Tensor) -> PromptTensors:
        """Views of the array's parts."""
        sizes = [self.tokens] * 3 + [self.tiles] * 2 + [self.samples] * 3
        if self.segments:
            sizes += [self.segments] * 3 + [self.tokens, self.samples]
        aligned = [_aligned(size) for size in sizes]
        parts = [part[:size] for part, size in zip(packed[: sum(aligned)].split(aligned), sizes, strict=True)]
        tokens, positions, slots, tile_starts, tile_counts, sample_rows, sample_slots, sample_positions, *lora = parts
        adapters = sample_bank_slots = None
        if self.segments:
            starts, counts, bank_slots, scales, sample_bank_slots = lora
            adapters = LoraRows(starts, counts, bank_slots, scales.view(torch.float32), PROMPT_SEGMENT_ROWS)
        return PromptTensors(
            tokens, positions, slots, tile_starts, tile_counts, sample_rows, sample_slots, sample_positions, adapters,
            sample_bank_slots,
        )  # fmt: skip


def shape_of(prompts: Prompts, *, padded: bool) -> PromptShape:
    """The exact shape, or the next larger one of the few for steps of up to `MAX_PADDED_TOKENS`."""
    num_tokens, num_samples = len(prompts.token_ids), len(prompts.sample_rows)
    num_tiles, num_segments = len(prompts.tile_starts), len(prompts.segment_starts)
    if not padded:
        return PromptShape(num_tokens, num_tiles, num_samples, num_segments)
    tokens = _next(_TOKEN_COUNTS, num_tokens)
    full_tiles, full_segments = -(-tokens // TILE_ROWS), -(-tokens // PROMPT_SEGMENT_ROWS)
    return PromptShape(
        tokens,
        full_tiles + _next(_SPARE_PARTS, max(1, num_tiles - full_tiles)),
        _next(_SAMPLE_COUNTS, num_samples),
        full_segments + _next(_SPARE_PARTS, max(1, num_segments - full_segments)) if num_segments else 0,
    )


def verified_shape(prompts: Prompts) -> PromptShape:
    """The next larger shape of the few for steps that sample after each token, of up to `MAX_VERIFIED_TOKENS`. They
    have no tiles."""
    tokens, num_segments = _next(_VERIFIED_COUNTS, len(prompts.token_ids)), len(prompts.segment_starts)
    return PromptShape(tokens, 0, tokens, _next(_VERIFIED_SEGMENTS, num_segments) if num_segments else 0)


def verified_shapes(*, with_adapters: bool) -> list[PromptShape]:
    """The usual ones of these."""
    segments = _VERIFIED_SEGMENTS if with_adapters else (0,)
    return [PromptShape(tokens, 0, tokens, count) for count in segments for tokens in _VERIFIED_COUNTS]


def usual_shapes(max_tokens: int, *, with_adapters: bool) -> Iterator[PromptShape]:
    """Padded shapes of steps of up to `max_tokens`: one prompt, a part of one, two and several short ones; and one
    longer shape that represents all unpadded ones."""
    first_tokens = [0, *_TOKEN_COUNTS]

    def shape(tokens: int, spare: int, samples: int) -> PromptShape:
        segments = -(-tokens // PROMPT_SEGMENT_ROWS) + spare if with_adapters else 0
        return PromptShape(tokens, -(-tokens // TILE_ROWS) + spare, samples, segments)

    for spare, samples in ((1, 1), (1, 0), (1, MAX_PADDED_SAMPLES), (_SPARE_PARTS[1], MAX_PADDED_SAMPLES)):
        for before, tokens in zip(first_tokens, _TOKEN_COUNTS, strict=False):
            if before < max_tokens:
                yield shape(tokens, spare, samples)
    for tokens in (_FEWER_ODD_TOKENS, ODD_TOKENS) if with_adapters else (ODD_TOKENS,):
        if max_tokens >= tokens:
            yield shape(tokens, 0, 1)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _next(sizes: tuple[int, ...], at_least: int) -> int:
    return next((size for size in sizes if size >= at_least), at_least)

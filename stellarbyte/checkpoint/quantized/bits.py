"""Codes of a few bits in words of 32, and two codes in a byte."""

import torch

# R rows, W words, C codes


def unpacked(words_RW: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """uint8 [R, count] of int32 [R, W]: code i of a row has the bits from i · bits on, the lowest first.

    Codes may lie in two words, as those of 3 bits do.
    """
    words_RW = words_RW.contiguous()
    if bits in (2, 4, 8):  # whole codes in a byte; numbers are little-endian here and in the file
        shifts = torch.arange(0, 8, bits)
        return (words_RW.view(torch.uint8)[..., None] >> shifts & 2**bits - 1).flatten(1)[:, :count].to(torch.uint8)
    words = torch.nn.functional.pad(words_RW.long() & 2**32 - 1, (0, 1))
    start = torch.arange(count) * bits
    word, shift = start // 32, start % 32
    return ((words[:, word] >> shift | words[:, word + 1] << 32 - shift) & 2**bits - 1).to(torch.uint8)


def num_words(count: int, bits: int) -> int:
    """Words that hold so many codes."""
    return -(-count * bits // 32)


def two_in_a_byte(codes_RC: torch.Tensor) -> torch.Tensor:
    """uint8 [R, C / 2] of codes of 4 bits: 2i in the low bits, 2i + 1 in the high ones."""
    return codes_RC[:, 0::2] | codes_RC[:, 1::2] << 4

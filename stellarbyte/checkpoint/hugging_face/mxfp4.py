"""MXFP4 (OCP Microscaling Formats 1.0): 32 numbers of e2m1, two in a byte, and their common power of two (e8m0)."""

import torch

BLOCK = 32  # numbers with one scale
_BYTES = BLOCK // 2
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)  # of each code
_BIAS = 127  # of a scale's exponent
_LARGEST_SCALE = 252  # 6 · 2^(252 - 127) is below bfloat16's largest number; 255 is NaN

# N rows, K numbers of a row


def decoded(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers as bfloat16 [N, K], which holds each of them exactly.

    Args:
        blocks: uint8 [N, K / 32, 16]; a byte's lower half is the earlier number.
        scales: uint8 [N, K / 32]; s stands for 2^(s - 127).

    Raises:
        ValueError: a scale is NaN, or too large for bfloat16.
    """
    if int(scales.max()) > _LARGEST_SCALE:
        raise ValueError(f"a scale of 2^{int(scales.max()) - _BIAS} is beyond bfloat16")
    values = torch.tensor(E2M1)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=1)  # [256, 2], of each byte
    numbers = pairs[blocks.int()].flatten(-2)  # [N, K / 32, 32]
    return torch.ldexp(numbers, scales.int()[..., None] - _BIAS).to(torch.bfloat16).flatten(1)


def is_packed(blocks: tuple[int, ...], scales: tuple[int, ...]) -> bool:
    """Whether these are shapes of blocks and scales that belong together, with any leading dimensions."""
    return blocks[:-1] == scales and blocks[-1:] == (_BYTES,)

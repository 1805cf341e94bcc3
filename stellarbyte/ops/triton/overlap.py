"""Lets a kernel begin while the one before it still runs: Hopper's programmatic dependent launch.

A small kernel is mostly its own beginning: launch, first loads. What it needs that no kernel writes, weights above all,
it can load while its inputs are still being computed.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def _overlaps(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def overlapping(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel that takes OVERLAPS and calls `wait_for_inputs`."""
    return {"OVERLAPS": True, "launch_pdl": True} if _overlaps(device) else {"OVERLAPS": False}


@triton.jit
def let_next_begin(OVERLAPS: tl.constexpr):
    """Let the programs of the next kernel have the multiprocessors that this one leaves, once all of its own run."""
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(OVERLAPS: tl.constexpr):
    """Wait until all kernels before have ended and their results can be read; let the next one begin if it may not yet.

    Until here a kernel may read what no kernel of a step writes, and must not write. A program that has nothing to do
    may end without it, if another one of the launch does not.
    """
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()

"""Lets a kernel begin while the one before it still runs: Hopper's programmatic dependent launch.

A small kernel spends most of its time on launch and first loads. It can load data that no kernel writes, above all
weights, while its inputs are still being computed.
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
    """Let the next kernel's programs use free multiprocessors, once all programs of this kernel run."""
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(OVERLAPS: tl.constexpr):
    """Wait until all earlier kernels have ended and their results are visible; let the next kernel begin.

    Before this call a kernel may read only data that no kernel of a step writes, and must not write. A program without
    work may end without the call if another program of the launch makes it.
    """
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def wait_then_let_next_begin(OVERLAPS: tl.constexpr):
    """As `wait_for_inputs`, but the next kernel begins later: it may read before its wait what was written before this
    kernel, past its own multiprocessor's cache (".cg")."""
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def no_tiles():
    """The tuple to which an unrolled loop adds the tiles that it loads ahead."""
    return ()

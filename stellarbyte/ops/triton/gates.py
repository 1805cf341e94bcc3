"""Functions of single numbers, for use in other kernels and as separate kernels: gates of the MLP, soft caps."""

import torch
import triton
import triton.language as tl

from stellarbyte.model.mlp import ClampedSwiglu
from stellarbyte.ops.triton.lora import Addend
from stellarbyte.ops.triton.overlap import overlapping, wait_for_inputs

# T tokens, I intermediate size, R rows that sample, V vocabulary

GATES = {"silu": 1, "gelu": 2, "gelu_tanh": 3}
NO_GATE = 0
_CLAMPED_SWIGLU = 4  # of experts alone
_COLUMNS = 1024


@triton.jit
def activate(x, GATE: tl.constexpr):
    """The gate's function of float32 numbers."""
    if GATE == 1:
        return x * tl.sigmoid(x)
    elif GATE == 2:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:  # tanh(y) = 2 · sigmoid(2y) - 1
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(2.0 * inner)


@triton.jit
def gate_product(gate, up, GATE: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """The gated product of float32 numbers; ALPHA and LIMIT are a clamped SwiGLU's. NaN stays NaN."""
    if GATE == 4:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        return (up + 1.0) * (gate * tl.sigmoid(ALPHA * gate))
    else:
        return activate(gate, GATE) * up


def gate_constants(gate: int, swiglu: ClampedSwiglu | None) -> dict[str, float]:
    """Compile-time constants for `gate_product`: of `gate`, or of the clamped SwiGLU in its place."""
    if swiglu is None:
        return {"GATE": gate, "ALPHA": 0.0, "LIMIT": 0.0}
    return {"GATE": _CLAMPED_SWIGLU, "ALPHA": float(swiglu.alpha), "LIMIT": float(swiglu.limit)}


@triton.jit
def soft_cap(x, cap):
    """cap · tanh(x / cap) of float32 numbers, with tanh(y) = 2 · sigmoid(2y) - 1."""
    return cap * (2.0 * tl.sigmoid(2.0 * x / cap) - 1.0)


def finish_logits(logits_RV: torch.Tensor, multiplier: float, softcap: float | None) -> None:
    """logits = c · tanh(multiplier · logits / c), in place; `softcap` c None: multiplier · logits. Contiguous."""
    count = logits_RV.numel()
    if not count:
        return
    _finish_logits_kernel[(triton.cdiv(count, _COLUMNS),)](
        logits_RV, count, multiplier, softcap, BLOCK=_COLUMNS, **overlapping(logits_RV.device)
    )


@triton.jit(do_not_specialize=["count"])
def _finish_logits_kernel(logits, count, multiplier, softcap, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_inputs(OVERLAPS)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    numbers = tl.load(logits + i, mask=inside, other=0.0).to(tl.float32) * multiplier
    if softcap is not None:
        numbers = soft_cap(numbers, softcap)
    tl.store(logits + i, numbers.to(logits.dtype.element_ty), mask=inside)


def apply_gate(gate_up_TI: torch.Tensor, gate: int, addend: Addend | None = None) -> torch.Tensor:
    """[T, gate | up] (+ addend) → activated gate · up, [T, I] contiguous."""
    num_rows, width = len(gate_up_TI), gate_up_TI.shape[1] // 2
    out_TI = gate_up_TI.new_empty(num_rows, width)
    _gate_kernel[(num_rows, triton.cdiv(width, _COLUMNS))](
        gate_up_TI,
        out_TI,
        width,
        *((None, None) if addend is None else addend),
        GATE=gate,
        BLOCK=_COLUMNS,
        **overlapping(gate_up_TI.device),
    )
    return out_TI


@triton.jit
def _gate_kernel(
    gate_up, out, width, delta, delta_scales, GATE: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr
):
    wait_for_inputs(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gates = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    ups = tl.load(gate_up + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    if delta is not None:
        if tl.load(delta_scales + row) != 0:
            gates += tl.load(delta + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
            ups += tl.load(delta + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded in between, like separate operators.
    gated = activate(gates, GATE).to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * width + column, (gated * ups).to(out.dtype.element_ty), mask=inside)

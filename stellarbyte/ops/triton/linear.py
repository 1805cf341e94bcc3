"""Linear layers of a few rows: one kernel reads the weights once and computes the operations around the product.

A step that decodes few sequences is limited by the memory reads of its weights. cuBLAS leaves much of the GPU idle
there, and every small kernel between two products costs microseconds, so the norm before a product and the gate and
residual after it are part of its kernel."""

import torch
import triton
import triton.language as tl

from stellarbyte.ops.triton.fp8 import takes_fp8
from stellarbyte.ops.triton.gates import NO_GATE, gate_product
from stellarbyte.ops.triton.overlap import let_next_begin, overlapping, wait_for_inputs
from stellarbyte.ops.triton.weights import Weight

# T rows, N outputs, K inputs

_HAS_PTX = tl.constexpr(not triton.knobs.runtime.interpret)

MAX_ROWS = 64
_MAX_FP8_ROWS = 16  # beyond, a product of rows in fp8 is faster


def linear(
    x_TK: torch.Tensor,
    weight: Weight,
    *,
    norm_K: torch.Tensor | None = None,
    eps: float = 0.0,
    gate: int = NO_GATE,
    residual_TN: torch.Tensor | None = None,
    branch_scale_N: torch.Tensor | None = None,
    out_TN: torch.Tensor | None = None,
    tile: tuple[int, int, int] | None = None,
) -> torch.Tensor:
    """residual + branch_scale · gate(W · norm(x) + bias) for at most `MAX_ROWS` contiguous rows.

    Args:
        norm_K: weight of an RMSNorm of x, with `eps`; for one row.
        gate: of `gates.GATES`; then W holds gates and ups, [2N, K], and the output is activated gate · up.
        tile: outputs and inputs of a program's tile, and its warps; None: those of the shape.
    """
    num_rows, num_inputs = x_TK.shape
    num_outputs = len(weight.matrix_NK) // (2 if gate else 1)
    if out_TN is None:
        out_TN = x_TK.new_empty(num_rows, num_outputs)
    if not num_rows:
        return out_TN
    assert norm_K is None or num_rows == 1, "several rows are normed by another kernel"
    rows = 1 if num_rows == 1 else max(8, triton.next_power_of_2(num_rows))
    if tile is None:
        tile = _tile(rows, num_outputs, num_inputs, weight.matrix_NK.element_size())
    block_n, block_k, num_warps = tile
    kernel = _vector_kernel if rows == 1 else _rows_kernel
    kernel[(triton.cdiv(num_outputs, block_n),)](
        x_TK,
        weight.matrix_NK,
        x_TK if weight.scales_N is None else weight.scales_N,
        x_TK if weight.bias_N is None else weight.bias_N,
        x_TK if norm_K is None else norm_K,
        x_TK if residual_TN is None else residual_TN,
        x_TK if branch_scale_N is None else branch_scale_N,
        out_TN,
        num_rows,
        num_outputs,
        num_inputs,
        eps,
        ROWS=rows,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        NUM_TILES=triton.cdiv(num_inputs, block_k),
        EVEN_K=num_inputs % block_k == 0,
        HAS_SCALES=weight.scales_N is not None,
        HAS_BIAS=weight.bias_N is not None,
        HAS_NORM=norm_K is not None,
        HAS_RESIDUAL=residual_TN is not None,
        HAS_BRANCH_SCALE=branch_scale_N is not None,
        GATE=gate,
        num_warps=num_warps,
        **overlapping(x_TK.device),
    )
    return out_TN


def is_for_few(x_TK: torch.Tensor, weight: Weight) -> bool:
    """Whether `linear` is fastest. cuBLAS is, for several rows and weights that need no conversion."""
    if weight.scales_N is None:
        return len(x_TK) <= 1
    return len(x_TK) <= (_MAX_FP8_ROWS if takes_fp8(x_TK, weight) else MAX_ROWS)


def _tile(rows: int, num_outputs: int, num_inputs: int, weight_bytes: int) -> tuple[int, int, int]:
    """Outputs and inputs of a program's tile, and its warps: enough programs to fill the GPU, long reads."""
    if rows > 1:  # each program reads all rows, so more rows need fewer programs
        block_n = max(rows, 16 if weight_bytes > 1 or num_outputs < 4096 else 32 if num_outputs < 8192 else 64)
        block_k = 256 if rows <= 16 and block_n <= 32 else 128
        return block_n, min(block_k, max(16, triton.next_power_of_2(num_inputs))), 4
    if num_inputs < 4096:
        return 2, triton.next_power_of_2(num_inputs), 4
    if weight_bytes == 1:  # half the bytes for each number, so more numbers in flight
        return (4, 4096, 4) if num_inputs <= 8192 else (4, 2048, 2)
    return 4, 2048, 4


@triton.jit
def finish(
    total, ups, addend, out, scales, bias, branch_scale, offsets, n, num_outputs, inside, HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_BRANCH_SCALE: tl.constexpr, GATE: tl.constexpr,
    ALPHA: tl.constexpr = 0.0, LIMIT: tl.constexpr = 0.0,
):  # fmt: skip
    """Store addend + branch_scale · (total + bias), or with a gate, the gated product of total and ups.

    All have one shape: `offsets` are indices into out, `n` the numbers of the outputs.
    """
    element = out.dtype.element_ty
    if HAS_SCALES:
        total *= tl.load(scales + n, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
    if GATE:
        if HAS_SCALES:
            ups *= tl.load(scales + num_outputs + n, mask=inside, other=0.0)
        if HAS_BIAS:
            ups += tl.load(bias + num_outputs + n, mask=inside, other=0.0).to(tl.float32)
        total = gate_product(total, ups, GATE, ALPHA, LIMIT)
    total = total.to(element).to(tl.float32)  # round like separate operators
    if HAS_BRANCH_SCALE:
        total *= tl.load(branch_scale + n, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        total += addend
    tl.store(out + offsets, total.to(element), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _vector_kernel(
    x, weight, scales, bias, norm, residual, branch_scale, out, num_rows, num_outputs, num_inputs, eps,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_TILES: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_BRANCH_SCALE: tl.constexpr, GATE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One row: every weight is used once, so the products are summed without the matrix units.

    Weights are loaded a tile ahead, the first one while the row is still being computed.
    """
    let_next_begin(OVERLAPS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < num_outputs
    k = tl.arange(0, BLOCK_K)
    tile = weight + n.to(tl.int64)[:, None] * num_inputs + k[None, :]
    to_ups = tl.cast(num_outputs, tl.int64) * num_inputs
    w = load_weights(tile, inside, k < num_inputs, EVEN_K)
    w_up = w
    if GATE:
        w_up = load_weights(tile + to_ups, inside, k < num_inputs, EVEN_K)
    wait_for_inputs(OVERLAPS)
    total = tl.zeros([BLOCK_N], tl.float32)
    addend = total
    if HAS_RESIDUAL:  # early, as nothing hides its latency at the end
        addend = tl.load(residual + n, mask=inside, other=0.0).to(tl.float32)
    ups = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for i in tl.static_range(NUM_TILES):
        some_k = k < num_inputs
        v = tl.load(x + k, mask=some_k, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += v * v
            v *= tl.load(norm + k, mask=some_k, other=0.0).to(tl.float32)
        this, this_up = w, w_up
        if i + 1 < NUM_TILES:
            k += BLOCK_K
            tile += BLOCK_K
            w = load_weights(tile, inside, k < num_inputs, EVEN_K)
            if GATE:
                w_up = load_weights(tile + to_ups, inside, k < num_inputs, EVEN_K)
        total += tl.sum(as_float32(this) * v[None, :], axis=1)
        if GATE:
            ups += tl.sum(as_float32(this_up) * v[None, :], axis=1)
    if HAS_NORM:
        factor = tl.rsqrt(tl.sum(squares, axis=0) / num_inputs + eps)
        total *= factor
        ups *= factor
    finish(
        total, ups, addend, out, scales, bias, branch_scale, n, n, num_outputs, inside,
        HAS_SCALES, HAS_BIAS, HAS_RESIDUAL, HAS_BRANCH_SCALE, GATE,
    )  # fmt: skip


@triton.jit
def as_float32(w):
    """Weights as float32. Four int8 become the last bytes of 2^23 + 128 + w, twice as fast as conversions."""
    if _HAS_PTX and w.dtype == tl.int8:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 bytes;
            xor.b32 bytes, $4, 0x80808080;
            prmt.b32 $0, bytes, 0x4B000000, 0x7650;
            prmt.b32 $1, bytes, 0x4B000000, 0x7651;
            prmt.b32 $2, bytes, 0x4B000000, 0x7652;
            prmt.b32 $3, bytes, 0x4B000000, 0x7653;
            sub.f32 $0, $0, 0f4B000080;
            sub.f32 $1, $1, 0f4B000080;
            sub.f32 $2, $2, 0f4B000080;
            sub.f32 $3, $3, 0f4B000080;
            }
            """,
            "=r,=r,=r,=r,r", [w], tl.float32, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return w.to(tl.float32)


@triton.jit
def load_weights(tile, inside_n, inside_k, EVEN_K: tl.constexpr):
    """Load a tile of weights; each is read once in a step."""
    if EVEN_K:
        return tl.load(tile, mask=inside_n[:, None], other=0.0, eviction_policy="evict_first")
    return tl.load(tile, mask=inside_n[:, None] & inside_k[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit(do_not_specialize=["num_rows"])
def _rows_kernel(
    x, weight, scales, bias, norm, residual, branch_scale, out, num_rows, num_outputs, num_inputs, eps,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_TILES: tl.constexpr, EVEN_K: tl.constexpr,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_BRANCH_SCALE: tl.constexpr, GATE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """A few rows: the weights are the wide operand of the matrix units, the rows the narrow one."""
    element = out.dtype.element_ty
    wait_for_inputs(OVERLAPS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.arange(0, ROWS)
    inside_n, inside_t = n < num_outputs, t < num_rows
    row = n.to(tl.int64)[:, None] * num_inputs
    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    ups = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for i in range(NUM_TILES):
        k = i * BLOCK_K + tl.arange(0, BLOCK_K)
        some_k = k < num_inputs
        if EVEN_K:
            mask = inside_n[:, None]
        else:
            mask = inside_n[:, None] & some_k[None, :]
        w = tl.load(weight + row + k[None, :], mask=mask, other=0.0).to(element)
        v = tl.load(x + t[None, :] * num_inputs + k[:, None], mask=some_k[:, None] & inside_t[None, :], other=0.0)
        total = tl.dot(w, v, total, input_precision="ieee")
        if GATE:
            w_up = tl.load(
                weight + tl.cast(num_outputs, tl.int64) * num_inputs + row + k[None, :], mask=mask, other=0.0
            )
            ups = tl.dot(w_up.to(element), v, ups, input_precision="ieee")
    inside = inside_n[:, None] & inside_t[None, :]
    many_n = n[:, None] + tl.zeros([1, ROWS], tl.int32)
    offsets = t[None, :] * num_outputs + many_n
    addend = total
    if HAS_RESIDUAL:
        addend = tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    finish(
        total, ups, addend, out, scales, bias, branch_scale, offsets, many_n, num_outputs, inside,
        HAS_SCALES, HAS_BIAS, HAS_RESIDUAL, HAS_BRANCH_SCALE, GATE,
    )  # fmt: skip

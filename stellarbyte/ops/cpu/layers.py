"""The decoder's layers, compiled. The mathematics is that of `model/decoder.py`.

numba compiles the code of a function again into every function that calls it. So those between `forward_layers` and the
kernels are inlined: each kernel is compiled for itself and once more into `forward_layers`.
"""

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from stellarbyte.ops.cpu import FAST_MATH, KEEP_COMPILED
from stellarbyte.ops.cpu.attention import Floats, Integers, Rotations, paged_attention, write_kv
from stellarbyte.ops.cpu.instructions import sum_of_squares
from stellarbyte.ops.cpu.linear import INVARIANT, NO_ACTIVATION, TILED, linear
from stellarbyte.ops.cpu.lora import add_rescaled, write_addends
from stellarbyte.ops.cpu.moe import ExpertBuffers, Experts, make_expert_buffers, mixture
from stellarbyte.ops.cpu.packing import StackedLinears
from stellarbyte.ops.cpu.panels.tiles import IS_THERE as HAS_UNIT
from stellarbyte.ops.cpu.query_tiles import FLOATS, SPLIT
from stellarbyte.ops.cpu.tiled_attention import MIN_QUERIES, can_tile, tiled_attention

# L layers, T tokens, C hidden size, D head dim, P panels of R rows


class LayerWeights(NamedTuple):
    """The weights of all layers, stacked; the last dimension of missing parts is 0."""

    qkv: StackedLinears
    output: StackedLinears
    gate_up: StackedLinears  # in the order of `interleave_gated`
    down: StackedLinears
    experts: Experts | None  # None: all layers are dense
    input_norm_LC: Floats
    attention_output_norm_LC: Floats
    mlp_norm_LC: Floats
    mlp_output_norm_LC: Floats
    softmax_sink_LH: Floats
    q_norm_LD: Floats
    k_norm_LD: Floats
    attention_scale_LC: Floats  # LayerScale and the residual multiplier
    mlp_scale_LC: Floats
    windows_L: Integers  # 0: none
    rotations_L: Integers  # which of the model's rotations
    score_scales_L: Floats


class LayerOptions(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    activation: np.int64
    sink_tokens: int
    softcap: float  # of scores; 0: none
    norm_eps: float
    alpha: float  # DeepNorm's factor of the residual stream; 0: no DeepNorm
    is_parallel: bool  # attention and MLP read one norm
    arithmetic: np.int64  # of `linear`


class Buffers(NamedTuple):
    """Memory for one layer's intermediate results; addends are [0, 0] in steps without adapters."""

    qkv: Floats
    attended: Floats
    inner: Floats
    qkv_addend: Floats
    gate_up_addend: Floats
    hidden_addend: Floats
    experts: ExpertBuffers | None


@njit(fastmath=FAST_MATH, nogil=True, cache=KEEP_COMPILED)
def forward_layers(x, weights, experts, options, batch, adapters, rotations, keys, values, num_threads):
    """Run all layers on x [T, C] in place, writing and reading the cache's keys and values [L, B, S, K, D].

    `experts`: the weights' own, an argument so that numba compiles nothing of them where they are None.
    """
    eps, alpha = np.float32(options.norm_eps), np.float32(options.alpha)
    buffers = _buffers(x, weights, options, adapters)
    normed, branch, other = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    for layer in range(len(weights.windows_L)):
        norm = weights.input_norm_LC[layer]
        source = _branch_input(x, norm, eps, alpha, normed, num_threads)
        kind = weights.rotations_L[layer]
        rotation = Rotations(
            rotations.cos_OD[kind], rotations.sin_OD[kind], rotations.decay_OD[kind], rotations.query_gain_D[kind]
        )
        _attention(
            source, layer, weights, options, batch, adapters, rotation, keys[layer], values[layer], buffers, branch,
            num_threads,
        )  # fmt: skip
        if not options.is_parallel:
            add_branch(x, branch, norm, eps, alpha, num_threads)
            norm = weights.mlp_norm_LC[layer]
            source = _branch_input(x, norm, eps, alpha, normed, num_threads)
        _mlp(source, layer, weights, experts, options, adapters, buffers, other, num_threads)
        if options.is_parallel:
            other += branch
        add_branch(x, other, norm, eps, alpha, num_threads)


@njit(inline="always")
def _attention(x, layer, weights, options, batch, adapters, rotations, keys, values, buffers, out, num_threads):
    """out [T, C] = the attention branch of a layer for its input x, writing the step's keys and values [B, S, K, D]."""
    shape, qkv, attended = (options.num_heads, options.num_kv_heads, options.head_dim), buffers.qkv, buffers.attended
    _project(
        x, layer, weights.qkv, adapters, NO_ACTIVATION, options.arithmetic, buffers.qkv_addend, qkv, num_threads
    )  # fmt: skip
    write_kv(
        qkv, shape, weights.q_norm_LD[layer], weights.k_norm_LD[layer], np.float32(options.norm_eps), batch, rotations,
        keys, values, num_threads,
    )  # fmt: skip
    window = weights.windows_L[layer]
    is_tiled = options.arithmetic != INVARIANT and can_tile(keys.shape[1], options.head_dim, window, options.softcap)
    if is_tiled:
        sinks, scale, softmax_sink = options.sink_tokens, weights.score_scales_L[layer], weights.softmax_sink_LH[layer]
        if HAS_UNIT and options.arithmetic == TILED:
            is_tiled = tiled_attention(
                SPLIT, qkv, shape, batch, rotations, keys, values, window, sinks, scale, softmax_sink, attended,
                num_threads,
            )  # fmt: skip
        else:
            is_tiled = tiled_attention(
                FLOATS, qkv, shape, batch, rotations, keys, values, window, sinks, scale, softmax_sink, attended,
                num_threads,
            )  # fmt: skip
    paged_attention(
        qkv, shape, batch, rotations, keys, values, window, options.sink_tokens, weights.score_scales_L[layer],
        np.float32(options.softcap), weights.softmax_sink_LH[layer], MIN_QUERIES - 1 if is_tiled else len(x),
        attended, num_threads,
    )  # fmt: skip
    _project(
        attended, layer, weights.output, adapters, NO_ACTIVATION, options.arithmetic, buffers.hidden_addend, out,
        num_threads,
    )  # fmt: skip
    finish_branch(out, weights.attention_output_norm_LC[layer], weights.attention_scale_LC[layer], options, num_threads)


@njit(inline="always")
def _mlp(x, layer, weights, experts, options, adapters, buffers, out, num_threads):
    """out [T, C] = the MLP branch of a layer for its input x."""
    if experts is None or experts.places_L[layer] < 0:
        _dense_mlp(x, layer, weights, options, adapters, buffers, out, num_threads)
    else:
        mixture(x, layer, experts, options.activation, options.arithmetic, buffers.experts, out, num_threads)
    finish_branch(out, weights.mlp_output_norm_LC[layer], weights.mlp_scale_LC[layer], options, num_threads)


@njit(inline="always")
def _dense_mlp(x, layer, weights, options, adapters, buffers, out, num_threads):
    inner, arithmetic = buffers.inner, options.arithmetic
    _project(
        x, layer, weights.gate_up, adapters, options.activation, arithmetic, buffers.gate_up_addend, inner,
        num_threads,
    )  # fmt: skip
    _project(
        inner, layer, weights.down, adapters, NO_ACTIVATION, arithmetic, buffers.hidden_addend, out, num_threads
    )  # fmt: skip


@njit(inline="always")
def _buffers(x, weights, options, adapters):
    num_tokens = len(x)
    return Buffers(
        np.empty((num_tokens, weights.qkv.widths.sum()), np.float32),
        np.empty((num_tokens, options.num_heads * options.head_dim), np.float32),
        np.empty((num_tokens, options.intermediate_size), np.float32),
        _addend(weights.qkv, num_tokens, adapters),
        _addend(weights.gate_up, num_tokens, adapters),
        _addend(weights.output, num_tokens, adapters),
        make_expert_buffers(x, weights.experts),
    )


@njit(inline="always")
def _addend(linears, num_tokens, adapters):
    """The addend of a product, zero for tokens without an adapter; empty if no token has one."""
    if len(adapters.tokens_J):
        return np.zeros((num_tokens, linears.weights.shape[1] * linears.weights.shape[3]), np.float32)
    return np.zeros((0, 0), np.float32)


@njit(inline="always")
def _project(x, layer, linears, adapters, activation, arithmetic, addend, out, num_threads):
    """out = `linear` of x by one layer of stacked linears, plus each token's adapter.

    For DoRA, the products of tokens with adapters are computed once more beforehand, so that other steps pay nothing.
    """
    place = linears.places_L[layer]
    weight = linears.weights[place], linears.scales[place], linears.minima[place]
    if len(adapters.tokens_J):
        is_gated = activation != NO_ACTIVATION
        write_addends(x, adapters, layer, linears.first, linears.widths, is_gated, addend, num_threads)
        if adapters.has_dora:
            rows, products = x[adapters.tokens_J], np.empty((len(adapters.tokens_J), addend.shape[1]), np.float32)
            no_bias, no_addend = np.zeros(0, np.float32), np.zeros((0, 0), np.float32)
            linear(rows, weight, no_bias, no_addend, products, NO_ACTIVATION, arithmetic, num_threads)
            add_rescaled(products, adapters, layer, linears.first, linears.widths, is_gated, addend, num_threads)
    linear(x, weight, linears.bias_LN[place], addend, out, activation, arithmetic, num_threads)


@njit(inline="always")
def _branch_input(x, norm, eps, alpha, normed, num_threads):
    """x with DeepNorm or without a norm before the branch, else its norm, written to `normed`."""
    if alpha != 0 or len(norm) == 0:
        return x
    rms_norm(x, norm, eps, normed, num_threads)
    return normed


# Not fast arithmetic, which may order the products otherwise in each function that this is compiled into; with NumPy's
# error model, for rows of NaN.
@njit(nogil=True, cache=KEEP_COMPILED, error_model="numpy")
def _norm_row(row, weight, eps, out):
    factor = np.float32(1.0) / np.sqrt(sum_of_squares(row) / np.float32(len(row)) + eps)
    for c in range(len(row)):
        out[c] = row[c] * factor * weight[c]


@njit(parallel=True, fastmath=FAST_MATH, nogil=True, cache=KEEP_COMPILED)
def _rms_norm_parallel(x, weight, eps, out, num_threads):
    for thread in prange(num_threads):
        for t in range(thread, len(x), num_threads):
            _norm_row(x[t], weight, eps, out[t])


@njit(nogil=True, cache=KEEP_COMPILED)
def rms_norm(x, weight, eps, out, num_threads):
    """out = RMSNorm of each row; on one thread for few rows, as waking others would take longer."""
    if len(x) > 16:
        _rms_norm_parallel(x, weight, eps, out, num_threads)
    else:
        for t in range(len(x)):
            _norm_row(x[t], weight, eps, out[t])


@njit(fastmath=FAST_MATH, nogil=True, cache=KEEP_COMPILED)
def add_branch(x, branch, norm, eps, alpha, num_threads):
    """x += branch, or with DeepNorm x = norm(alpha · x + branch)."""
    if alpha == 0:
        x += branch
    else:
        x *= alpha
        x += branch
        rms_norm(x, norm, eps, x, num_threads)


@njit(fastmath=FAST_MATH, nogil=True, cache=KEEP_COMPILED)
def finish_branch(branch, norm, scale, options, num_threads):
    """branch = scale · norm(branch), in place; each of them only if it is there."""
    if len(norm):
        rms_norm(branch, norm, np.float32(options.norm_eps), branch, num_threads)
    if len(scale):
        branch *= scale

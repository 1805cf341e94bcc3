"""The decoder's layers as one compiled function. The mathematics is that of `model/decoder.py`."""

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from stellarbyte.lora.bank import SHARED_INPUTS
from stellarbyte.ops.cpu import KEEP_COMPILED
from stellarbyte.ops.cpu.attention import Floats, Integers, paged_attention, write_kv
from stellarbyte.ops.cpu.linear import NO_ACTIVATION, linear
from stellarbyte.ops.cpu.lora import write_addends
from stellarbyte.ops.cpu.packing import PackedWeight

# L layers, T tokens, C hidden size, D head dim

_QKV, _OUTPUT, _GATE_UP, _DOWN = (projections.start for projections in SHARED_INPUTS)


class LayerWeights(NamedTuple):
    """The weights of all layers, stacked; what a model lacks is empty in its last dimension."""

    qkv: PackedWeight
    output: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight
    qkv_bias: Floats
    output_bias: Floats
    gate_up_bias: Floats
    down_bias: Floats
    input_norm_LC: Floats
    mlp_norm_LC: Floats  # empty: attention and MLP in parallel
    q_norm_LD: Floats
    k_norm_LD: Floats
    attention_scale_LC: Floats  # LayerScale
    mlp_scale_LC: Floats
    windows_L: Integers  # 0: none


class LayerOptions(NamedTuple):
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    activation: int
    sink_tokens: int
    score_scale: float
    norm_eps: float
    alpha: float  # DeepNorm's factor of the residual stream; 0: norms come before the branches


@njit(fastmath=True, nogil=True, cache=KEEP_COMPILED)
def forward_layers(x, weights, options, batch, adapters, rotations, keys, values, num_threads):
    """Run all layers on x [T, C] in place, writing and reading the cache's keys and values [L, B, S, K, D]."""
    shape = (options.num_heads, options.num_kv_heads, options.head_dim)
    eps, post_norm = np.float32(options.norm_eps), options.alpha != 0
    is_parallel = weights.mlp_norm_LC.shape[1] == 0
    num_tokens = len(x)
    query_size = options.num_heads * options.head_dim
    qkv = np.empty((num_tokens, query_size + 2 * options.num_kv_heads * options.head_dim), np.float32)
    attended = np.empty((num_tokens, query_size), np.float32)
    inner = np.empty((num_tokens, options.intermediate_size), np.float32)
    normed, branch, other = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    is_adapted = len(adapters.tokens_J) > 0
    key_size = options.num_kv_heads * options.head_dim
    qkv_widths, hidden_widths = np.array([query_size, key_size, key_size]), np.array([x.shape[1]])
    gate_up_widths = np.array([options.intermediate_size, options.intermediate_size])
    qkv_addend = _addend(weights.qkv, num_tokens, is_adapted)
    gate_up_addend = _addend(weights.gate_up, num_tokens, is_adapted)
    hidden_addend = _addend(weights.output, num_tokens, is_adapted)
    for layer in range(len(weights.windows_L)):
        source = x
        if not post_norm:
            rms_norm(x, weights.input_norm_LC[layer], eps, normed, num_threads)
            source = normed
        if is_adapted:
            write_addends(source, adapters, layer, _QKV, qkv_widths, False, qkv_addend, num_threads)
        linear(source, _layer(weights.qkv, layer), weights.qkv_bias[layer], qkv_addend, qkv, NO_ACTIVATION, num_threads)
        write_kv(
            qkv, shape, weights.q_norm_LD[layer], weights.k_norm_LD[layer], eps, batch, rotations,
            keys[layer], values[layer], num_threads,
        )  # fmt: skip
        paged_attention(
            qkv, shape, batch, rotations, keys[layer], values[layer], weights.windows_L[layer],
            options.sink_tokens, np.float32(options.score_scale), attended, num_threads,
        )  # fmt: skip
        if is_adapted:
            write_addends(attended, adapters, layer, _OUTPUT, hidden_widths, False, hidden_addend, num_threads)
        linear(
            attended, _layer(weights.output, layer), weights.output_bias[layer], hidden_addend, branch,
            NO_ACTIVATION, num_threads,
        )  # fmt: skip
        scale_channels(branch, weights.attention_scale_LC[layer])
        if not is_parallel:
            add_branch(x, branch, weights.input_norm_LC[layer], eps, np.float32(options.alpha), num_threads)
            source = x
            if not post_norm:
                rms_norm(x, weights.mlp_norm_LC[layer], eps, normed, num_threads)
                source = normed
        if is_adapted:
            write_addends(source, adapters, layer, _GATE_UP, gate_up_widths, True, gate_up_addend, num_threads)
        linear(
            source, _layer(weights.gate_up, layer), weights.gate_up_bias[layer], gate_up_addend, inner,
            options.activation, num_threads,
        )  # fmt: skip
        if is_adapted:
            write_addends(inner, adapters, layer, _DOWN, hidden_widths, False, hidden_addend, num_threads)
        linear(
            inner, _layer(weights.down, layer), weights.down_bias[layer], hidden_addend, other,
            NO_ACTIVATION, num_threads,
        )  # fmt: skip
        scale_channels(other, weights.mlp_scale_LC[layer])
        norm = weights.mlp_norm_LC[layer]
        if is_parallel:
            norm = weights.input_norm_LC[layer]
            other += branch
        add_branch(x, other, norm, eps, np.float32(options.alpha), num_threads)


@njit(inline="always")
def _addend(stacked, num_tokens, is_adapted):
    """Zeros that `linear` adds to a product of this weight, for tokens without an adapter; nothing if all are."""
    if is_adapted:
        return np.zeros((num_tokens, stacked.weights.shape[1] * stacked.weights.shape[3]), np.float32)
    return np.zeros((0, 0), np.float32)


@njit(inline="always")
def _layer(stacked, layer):
    return stacked.weights[layer], stacked.scales[layer], stacked.minima[layer]


@njit(inline="always")
def _norm_row(row, weight, eps, out):
    total = np.float32(0.0)
    for c in range(len(row)):
        total += row[c] * row[c]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(len(row)) + eps)
    for c in range(len(row)):
        out[c] = row[c] * factor * weight[c]


@njit(parallel=True, fastmath=True, nogil=True, cache=KEEP_COMPILED)
def _rms_norm_parallel(x, weight, eps, out, num_threads):
    for thread in prange(num_threads):
        for t in range(thread, len(x), num_threads):
            _norm_row(x[t], weight, eps, out[t])


# Without NumPy's error model a row of NaN would raise ZeroDivisionError: fast arithmetic takes NaN for equal to 0.
@njit(fastmath=True, nogil=True, cache=KEEP_COMPILED, error_model="numpy")
def rms_norm(x, weight, eps, out, num_threads):
    """out = RMSNorm of each row; for a few rows, waking the other threads would cost more than it saves."""
    if len(x) > 16:
        _rms_norm_parallel(x, weight, eps, out, num_threads)
    else:
        for t in range(len(x)):
            _norm_row(x[t], weight, eps, out[t])


@njit(fastmath=True, nogil=True, cache=KEEP_COMPILED)
def add_branch(x, branch, norm, eps, alpha, num_threads):
    """x += branch, or with DeepNorm x = norm(alpha · x + branch)."""
    if alpha == 0:
        x += branch
    else:
        x *= alpha
        x += branch
        rms_norm(x, norm, eps, x, num_threads)


@njit(fastmath=True, nogil=True, cache=KEEP_COMPILED)
def scale_channels(x, scale):
    if len(scale):
        x *= scale

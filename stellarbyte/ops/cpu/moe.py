"""A layer's mixture of experts on the CPU. The mathematics is that of `model/moe/layer.py`.

Pairs of tokens and experts are sorted by expert. So an expert's panels are read once for all of its tokens, and those
of experts that no token chose are not read. A thread computes the same range of panels of every expert: however the
tokens are spread, threads have equal work, and only one thread adds to a channel of a token, expert by expert.
"""

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from stellarbyte.ops.cpu import FAST_MATH, KEEP_COMPILED
from stellarbyte.ops.cpu.attention import Floats, Integers
from stellarbyte.ops.cpu.instructions import exp
from stellarbyte.ops.cpu.linear import (
    INVARIANT,
    NO_ACTIVATION,
    linear,
    write_tile,
)
from stellarbyte.ops.cpu.packing import PackedWeight, StackedLinears
from stellarbyte.ops.cpu.panels.floats import float32_panels, tile_product
from stellarbyte.ops.cpu.panels.packed import most_packed, packed_product, packed_rows
from stellarbyte.ops.cpu.panels.sizes import LARGEST_TILE, PANEL_ROWS, tile_size
from stellarbyte.ops.cpu.routing import Pairs, Routers, gather, make_pairs, route

# T tokens, N pairs, C hidden size, I inner size of an expert, S of the shared expert, P panels of R rows


class Experts(NamedTuple):
    """Routers and experts of all layers that have some.

    `gate_up` and `down` are the panels of all experts of all pools, one below the other.
    """

    places_L: Integers  # which of the routers is a layer's; -1: the layer is dense
    pools_L: Integers  # which pool's experts a layer uses
    routers: Routers
    gate_up: PackedWeight  # each expert's rows in the order of `interleave_gated`
    down: PackedWeight
    intermediate_size: int
    shared_gate_up: StackedLinears  # of the layers with a shared expert, in the order of `interleave_gated`
    shared_down: StackedLinears
    shared_intermediate_size: int  # 0: no shared expert
    has_shared_gate: bool


class ExpertBuffers(NamedTuple):
    """Memory for one layer's intermediate results."""

    pairs: Pairs
    x_NC: Floats
    inner_NI: Floats
    shared_inner_TS: Floats


@njit(nogil=True, cache=KEEP_COMPILED)
def make_expert_buffers(x, experts):
    """Buffers for the rows of x [T, C]; None for a model without experts."""
    if experts is None:
        return None
    num_tokens, width = x.shape
    num_pairs = num_tokens * experts.routers.top_k
    num_logits = experts.routers.num_experts + (1 if experts.has_shared_gate else 0)
    return ExpertBuffers(
        make_pairs(num_tokens, experts.routers, num_logits),
        np.empty((num_pairs, width), np.float32),
        np.empty((num_pairs, experts.intermediate_size), np.float32),
        np.empty((num_tokens, experts.shared_intermediate_size), np.float32),
    )


@njit(inline="always", fastmath=FAST_MATH, nogil=True, cache=KEEP_COMPILED)
def mixture(x, layer, experts, activation, arithmetic, buffers, out, num_threads):
    """out [T, C] = Σ gate · expert(x) over each token's chosen experts, plus the shared expert's output.

    `arithmetic`: as in `linear`, but products of experts are never TILED.
    """
    pairs, num_experts = buffers.pairs, experts.routers.num_experts
    route(x, experts.places_L[layer], experts.routers, pairs, num_threads)
    if experts.shared_intermediate_size:
        _shared_expert(x, layer, experts, activation, arithmetic, buffers, out, num_threads)
    else:
        out[:] = np.float32(0.0)
    gather(x, pairs.tokens_N, buffers.x_NC, num_threads)
    first = experts.pools_L[layer] * num_experts
    expert_linear(
        buffers.x_NC, experts.gate_up, first, pairs, buffers.inner_NI, activation, arithmetic, num_threads
    )  # fmt: skip
    expert_linear(buffers.inner_NI, experts.down, first, pairs, out, NO_ACTIVATION, arithmetic, num_threads)


@njit(inline="always")
def _shared_expert(x, layer, experts, activation, arithmetic, buffers, out, num_threads):
    """out = the shared expert's output; its gate multiplies the fewer numbers before the last product."""
    inner = buffers.shared_inner_TS
    nothing, no_addend = np.zeros(0, np.float32), np.zeros((0, 0), np.float32)
    gate_up, down = experts.shared_gate_up, experts.shared_down
    place = gate_up.places_L[layer]
    weight = gate_up.weights[place], gate_up.scales[place], gate_up.minima[place]
    linear(x, weight, nothing, no_addend, inner, activation, arithmetic, num_threads)
    if experts.has_shared_gate:
        _multiply_by_gates(inner, buffers.pairs.logits_TE, experts.routers.num_experts)
    weight = down.weights[place], down.scales[place], down.minima[place]
    linear(inner, weight, nothing, no_addend, out, NO_ACTIVATION, arithmetic, num_threads)


# NumPy's error model, or a gate of NaN would raise ZeroDivisionError: fast arithmetic treats NaN as 0.
@njit(fastmath=FAST_MATH, nogil=True, cache=KEEP_COMPILED, error_model="numpy")
def _multiply_by_gates(inner, logits, column):
    """inner[t] *= sigmoid(logits[t, column])"""
    for t in range(len(inner)):
        inner[t] *= np.float32(1.0) / (np.float32(1.0) + exp(-logits[t, column]))


@njit(parallel=True, fastmath=FAST_MATH, nogil=True, cache=KEEP_COMPILED)
def expert_linear(x, weight, first_expert, pairs, out, activation, arithmetic, num_threads):
    """Products of sorted pairs with the matrices of their experts.

    With an activation, out[n] = activation(gate) · up, as in `linear`. Without one, each pair's product times its gate
    is added to its token: out[tokens_N[n]] += gates_N[n] · x[n] · Wᵀ.

    Args:
        x: [N, K] float32, contiguous.
        weight: the panels of many experts, equally many of each.
        first_expert: number of the pairs' expert 0 among them.
        out: [N, I], overwritten, or [T, C].
        activation: NO_ACTIVATION, SILU, GELU or GELU_TANH.
        arithmetic: as in `linear`, but never TILED.
        num_threads: numba threads to use.
    """
    weights, scales, minima = weight
    starts, num_columns = pairs.starts_E, x.shape[1]
    num_rows = out.shape[1] if activation == NO_ACTIVATION else 2 * out.shape[1]
    num_panels = (num_rows + PANEL_ROWS - 1) // PANEL_ROWS
    is_invariant = arithmetic == INVARIANT
    rows = packed_rows(x, weight, starts, num_threads)
    nothing, no_addend = np.zeros(0, np.float32), np.zeros((0, 0), np.float32)
    for thread in prange(num_threads):
        sums = np.empty(LARGEST_TILE * PANEL_ROWS, np.float32)
        buffer = np.empty((0 if len(x) <= most_packed(weights) else 1, num_columns, PANEL_ROWS), np.float32)
        for expert in range(len(starts) - 1):
            start, end = starts[expert], starts[expert + 1]
            if start == end:
                continue
            is_packed = end - start <= most_packed(weights)
            for panel in range(thread * num_panels // num_threads, (thread + 1) * num_panels // num_threads):
                number = (first_expert + expert) * num_panels + panel
                panels = buffer if is_packed else float32_panels(weight, number, 1, buffer)
                first = start
                while first < end:
                    tile = tile_size(end - first)
                    if is_packed:
                        packed_product(weight, number, rows, first, tile, sums, is_invariant)
                    else:
                        tile_product(panels, scales, minima, 0, x, first, tile, sums)
                    if activation == NO_ACTIVATION:
                        _add_tile(sums, tile, first, panel, pairs, out)
                    else:
                        write_tile(sums, tile, first, panel, nothing, no_addend, out, activation)
                    first += tile


@njit(inline="always")
def _add_tile(sums, num_pairs, first, panel, pairs, out):
    """Add a tile of sums, each times its pair's gate, to the pairs' tokens."""
    row = panel * PANEL_ROWS
    width = min(PANEL_ROWS, out.shape[1] - row)
    for i in range(num_pairs):
        token, gate = pairs.tokens_N[first + i], pairs.gates_N[first + i]
        for r in range(width):
            out[token, row + r] += gate * sums[i * PANEL_ROWS + r]

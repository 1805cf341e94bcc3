"""The router of a mixture of experts on the CPU: each token's experts and gates, and its pairs sorted by expert.

The mathematics is that of `model/moe/router.py`, outside training and with a fixed number of experts for each token.
"""

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from stellarbyte.ops.cpu import KEEP_COMPILED
from stellarbyte.ops.cpu.attention import Floats, Integers
from stellarbyte.ops.cpu.instructions import exp
from stellarbyte.ops.cpu.linear import INVARIANT, NO_ACTIVATION, linear

# T tokens, E experts, K chosen experts of a token, N = T · K pairs, M layers with experts, P panels of R rows

_FEW_ROWS = 16  # which one thread computes in less time than waking others takes
_SMALLEST = np.finfo(np.float32).tiny  # a divisor in the place of 0


class Routers(NamedTuple):
    """The routers of all layers with experts, stacked."""

    weights_MPCR: Floats  # in panels; the row below the experts' is that of the shared expert's gate, if it has one
    bias_MN: Floats  # [M, P · R], or [M, 0]
    selection_bias_ME: Floats  # added to the scores for the choice only; [M, E], or [M, 0]
    num_experts: int
    top_k: int
    is_sigmoid: bool  # scores are sigmoids of the logits, else their softmax
    renormalises: bool  # divide the gates of a token by their sum


class Pairs(NamedTuple):
    """Memory for the choices of a step's tokens. A pair is a token and an expert that it chose."""

    logits_TE: Floats  # overwritten by the scores; with a last column for the logit of the shared expert's gate
    chosen_TK: Integers  # the best first
    gates_TK: Floats
    starts_E: Integers  # [E + 1]: pairs starts_E[e] to starts_E[e + 1] are those of expert e, by token
    tokens_N: Integers
    gates_N: Floats


@njit(nogil=True, cache=KEEP_COMPILED)
def make_pairs(num_tokens, routers, num_logits):
    """Uninitialized memory; `num_logits`: num_experts, or one more with a gate of the shared expert."""
    top_k = routers.top_k
    return Pairs(
        np.empty((num_tokens, num_logits), np.float32),
        np.empty((num_tokens, top_k), np.int64),
        np.empty((num_tokens, top_k), np.float32),
        np.empty(routers.num_experts + 1, np.int64),
        np.empty(num_tokens * top_k, np.int64),
        np.empty(num_tokens * top_k, np.float32),
    )


@njit(nogil=True, cache=KEEP_COMPILED)
def route(x, place, routers, pairs, num_threads):
    """Choose the experts of each row of x [T, C] by router number `place`, and sort the pairs."""
    nothing, no_addend = np.zeros((1, 0, 1), np.float32), np.zeros((0, 0), np.float32)
    weight = routers.weights_MPCR[place], nothing, nothing
    linear(x, weight, routers.bias_MN[place], no_addend, pairs.logits_TE, NO_ACTIVATION, INVARIANT, num_threads)
    selection_bias = routers.selection_bias_ME[place]
    if len(x) > _FEW_ROWS:
        _choose_parallel(selection_bias, routers, pairs, num_threads)
    else:
        preferences = np.empty(routers.num_experts, np.float32)
        for t in range(len(x)):
            _choose(t, selection_bias, routers, pairs, preferences)
    _sort(pairs)


@njit(parallel=True, nogil=True, cache=KEEP_COMPILED)
def _choose_parallel(selection_bias, routers, pairs, num_threads):
    num_tokens = len(pairs.chosen_TK)
    for thread in prange(num_threads):
        preferences = np.empty(routers.num_experts, np.float32)
        for t in range(thread, num_tokens, num_threads):
            _choose(t, selection_bias, routers, pairs, preferences)


# Without fast arithmetic, and with NumPy's error model: of NaN, too, the chosen experts exist, and nothing is raised.
@njit(nogil=True, cache=KEEP_COMPILED, error_model="numpy")
def _choose(t, selection_bias, routers, pairs, preferences):
    """Token t's experts, those of the highest scores and on ties of the lowest numbers, and their gates."""
    scores, chosen, gates = pairs.logits_TE[t], pairs.chosen_TK[t], pairs.gates_TK[t]
    _score(scores, routers.num_experts, routers.is_sigmoid)
    for e in range(routers.num_experts):
        preferences[e] = scores[e]
    for e in range(len(selection_bias)):
        preferences[e] += selection_bias[e]
    total = np.float32(0.0)
    for k in range(routers.top_k):
        best, highest = 0, preferences[0]
        for e in range(1, routers.num_experts):
            if preferences[e] > highest:
                best, highest = e, preferences[e]
        preferences[best] = -np.inf
        chosen[k], gates[k] = best, scores[best]
        total += scores[best]
    if routers.renormalises:
        total = max(total, _SMALLEST)
        for k in range(routers.top_k):
            gates[k] /= total


@njit(inline="always")
def _score(logits, num_experts, is_sigmoid):
    """logits[:num_experts] = their sigmoids or their softmax."""
    one = np.float32(1.0)
    if is_sigmoid:
        for e in range(num_experts):
            logits[e] = one / (one + exp(-logits[e]))
    else:
        highest, total = logits[0], np.float32(0.0)
        for e in range(1, num_experts):
            highest = max(highest, logits[e])
        for e in range(num_experts):
            logits[e] = exp(logits[e] - highest)
            total += logits[e]
        for e in range(num_experts):
            logits[e] /= total


@njit(nogil=True, cache=KEEP_COMPILED)
def _sort(pairs):
    """Write the pairs by expert, those of one expert by token."""
    starts, chosen = pairs.starts_E, pairs.chosen_TK
    num_tokens, top_k = chosen.shape
    starts[:] = 0
    for t in range(num_tokens):
        for k in range(top_k):
            starts[chosen[t, k] + 1] += 1
    for e in range(1, len(starts)):
        starts[e] += starts[e - 1]
    next_E = starts[:-1].copy()
    for t in range(num_tokens):
        for k in range(top_k):
            expert = chosen[t, k]
            n = next_E[expert]
            next_E[expert] += 1
            pairs.tokens_N[n], pairs.gates_N[n] = t, pairs.gates_TK[t, k]


@njit(nogil=True, cache=KEEP_COMPILED)
def gather(x, rows, out, num_threads):
    """out[n] = x[rows[n]]"""
    if len(rows) > 4 * _FEW_ROWS:
        _gather_parallel(x, rows, out, num_threads)
    else:
        for n in range(len(rows)):
            out[n] = x[rows[n]]


@njit(parallel=True, nogil=True, cache=KEEP_COMPILED)
def _gather_parallel(x, rows, out, num_threads):
    for thread in prange(num_threads):
        for n in range(thread * len(rows) // num_threads, (thread + 1) * len(rows) // num_threads):
            out[n] = x[rows[n]]

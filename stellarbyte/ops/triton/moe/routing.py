"""The router on the GPU: each token's experts and gates, and the list of each expert's tokens.

A token's score for an expert becomes a rank by counting the experts before it; those of the first ranks are chosen.
So nothing is sorted, equal scores go to the lower expert, and all experts are ranked at once. NaN ranks last: any input
chooses experts that exist.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from stellarbyte.ops.triton.linear import as_float32
from stellarbyte.ops.triton.moe.scratch import ExpertScratch
from stellarbyte.ops.triton.overlap import let_next_begin, overlapping, wait_for_inputs

# T tokens, E experts, J chosen experts of a token, C hidden size

MAX_EXPERTS = 512
MAX_TOP_K = 16
MAX_NORMED_ROWS = 32  # of tokens whose logits, norm and choice are one launch
_FEW_NUMBERS = 8192  # of the router's matrix for one of its programs
_FEW_WARPS = 4
_RANKED_TOGETHER = tl.constexpr(32)  # experts that all others are compared with at once


@dataclass(frozen=True, kw_only=True)
class Router:
    """Scores every expert for a token, and chooses those with the highest scores.

    Raises:
        ValueError: the kernels do not support these numbers of experts, or this score.
    """

    weight_EC: torch.Tensor  # in the model's dtype
    top_k: int
    score: str  # "softmax" over all experts, or "sigmoid" of each
    renormalizes: bool  # divide the gates of a token by their sum
    bias_E: torch.Tensor | None = None  # float32, added to the logits
    selection_bias_E: torch.Tensor | None = None  # float32, added to the scores for the choice only

    def __post_init__(self) -> None:
        if len(self.weight_EC) > MAX_EXPERTS:
            raise ValueError(f"num_experts ({len(self.weight_EC)}) must be at most {MAX_EXPERTS} on a GPU")
        if not 1 <= self.top_k <= min(MAX_TOP_K, len(self.weight_EC)):
            raise ValueError(
                f"num_experts_per_tok ({self.top_k}) must be from 1 to {min(MAX_TOP_K, len(self.weight_EC))} on a GPU"
            )
        if self.score not in ("softmax", "sigmoid"):
            raise ValueError(f"router_score ({self.score!r}) must be softmax or sigmoid on a GPU")


def route(
    x_TC: torch.Tensor,
    router: Router,
    scratch: ExpertScratch,
    *,
    norm_C: torch.Tensor | None = None,
    eps: float = 0.0,
    lists_pairs: bool = True,
    is_invariant: bool = False,
) -> torch.Tensor:
    """Choose each token's experts: `chosen` and `gates` of the scratch. Returns norm(x), which the router reads.

    Logits and gates are in float32.

    Args:
        x_TC: contiguous, in the router's dtype; at least one row, at most those of the scratch.
        norm_C: weight of an RMSNorm of x, with `eps`, for at most `MAX_NORMED_ROWS` rows.
        lists_pairs: also list the pairs of each expert, in `counts` and `lists`; counts must be 0.
        is_invariant: the bits of a row do not depend on the other rows; without a norm.
    """
    num_tokens, width = x_TC.shape
    num_experts = len(router.weight_EC)
    assert x_TC.is_contiguous() and x_TC.dtype == router.weight_EC.dtype
    assert 0 < num_tokens <= scratch.max_rows, "the scratch is for fewer rows"
    choice = (
        router.weight_EC if router.selection_bias_E is None else router.selection_bias_E,
        scratch.logits,
        scratch.chosen,
        scratch.gates,
        scratch.counts,
        scratch.lists,
        num_tokens,
        num_experts,
    )
    options = {
        "TOP_K": router.top_k,
        "IS_SOFTMAX": router.score == "softmax",
        "RENORMALIZES": router.renormalizes,
        "HAS_SELECTION_BIAS": router.selection_bias_E is not None,
        "LISTS_PAIRS": lists_pairs,
        **overlapping(x_TC.device),
    }
    bias = router.weight_EC if router.bias_E is None else router.bias_E
    if is_invariant or num_tokens > MAX_NORMED_ROWS:
        assert norm_C is None, "many rows come normed"
        _many_logits(x_TC, router, bias, scratch, has_small_tiles=is_invariant or num_tokens <= 512)
        _choose_kernel[(num_tokens,)](*choice, EXPERTS=_lanes(num_experts, 1), num_warps=1, **options)
        return x_TC
    normed_TC = x_TC if norm_C is None else scratch.normed[: x_TC.numel()].view(x_TC.shape)
    block_c = triton.next_power_of_2(width)
    block_e = min(triton.next_power_of_2(num_experts), max(1, _FEW_NUMBERS // block_c))
    _few_kernel[(triton.cdiv(num_experts, block_e), num_tokens)](
        x_TC, x_TC if norm_C is None else norm_C, normed_TC, router.weight_EC, bias, scratch.arrivals, *choice,
        width, eps, HAS_NORM=norm_C is not None, HAS_BIAS=router.bias_E is not None, BLOCK_E=block_e, BLOCK_C=block_c,
        EXPERTS=_lanes(num_experts, _FEW_WARPS), num_warps=_FEW_WARPS, **options,
    )  # fmt: skip
    return normed_TC


def _lanes(num_experts: int, num_warps: int) -> int:
    """At least one expert for each thread, so that no atomic operation is carried out twice."""
    return max(triton.next_power_of_2(num_experts), 32 * num_warps)


def _many_logits(
    x_TC: torch.Tensor, router: Router, bias: torch.Tensor, scratch: ExpertScratch, *, has_small_tiles: bool
) -> None:
    num_tokens, width = x_TC.shape
    num_experts = len(router.weight_EC)
    tokens, experts, block_c = (16, 16, 256) if has_small_tiles else (64, 64, 64)
    block_c = min(block_c, max(16, triton.next_power_of_2(width)))
    _logits_kernel[(triton.cdiv(num_experts, experts), triton.cdiv(num_tokens, tokens))](
        x_TC, router.weight_EC, bias, scratch.logits, num_tokens, num_experts, width,
        HAS_BIAS=router.bias_E is not None, TOKENS=tokens, EXPERTS=experts, BLOCK_C=block_c,
        NUM_TILES=triton.cdiv(width, block_c), **overlapping(x_TC.device),
    )  # fmt: skip


@triton.jit
def _without_nan(preference, inside):
    return tl.where(inside & (preference == preference), preference, float("-inf"))


@triton.jit
def _choose(
    selection_bias, logits, chosen, gates, counts, lists, num_tokens, num_experts, token,
    TOP_K: tl.constexpr, IS_SOFTMAX: tl.constexpr, RENORMALIZES: tl.constexpr, HAS_SELECTION_BIAS: tl.constexpr,
    LISTS_PAIRS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Choose the experts of one token by its logits, which all threads see."""
    e = tl.arange(0, EXPERTS)
    inside = e < num_experts
    row = logits + token.to(tl.int64) * num_experts
    logit = tl.load(row + e, mask=inside, other=float("-inf"))
    if IS_SOFTMAX:
        score = tl.exp(logit - tl.max(logit, axis=0))
        if HAS_SELECTION_BIAS or not RENORMALIZES:  # otherwise only their ratios count
            score /= tl.sum(score, axis=0)
    else:
        score = tl.sigmoid(logit)
    preference = logit  # in the order of the scores, and at hand before them
    if HAS_SELECTION_BIAS:
        preference = score + tl.load(selection_bias + e, mask=inside, other=0.0)
        # Through memory, so that both sides of a comparison have the same bits.
        tl.store(row + e, preference, mask=inside)
        tl.debug_barrier()
    preference = _without_nan(preference, inside)
    rank = tl.zeros([EXPERTS], tl.int32)
    for first in tl.static_range(0, EXPERTS, _RANKED_TOGETHER):  # unrolled, so that no load waits for another
        other = first + tl.arange(0, _RANKED_TOGETHER)
        theirs = tl.load(row + other, mask=other < num_experts, other=float("-inf"))
        theirs = _without_nan(theirs, other < num_experts)[None, :]
        ties = (theirs == preference[:, None]) & (other[None, :] < e[:, None])
        rank += tl.sum(((theirs > preference[:, None]) | ties).to(tl.int32), axis=1)
    is_chosen = rank < TOP_K
    gate = score
    if RENORMALIZES:
        gate /= tl.sum(tl.where(is_chosen, score, 0.0), axis=0)
    pair = token * TOP_K + rank
    tl.store(chosen + pair, e, mask=is_chosen)
    tl.store(gates + pair, gate, mask=is_chosen)
    if LISTS_PAIRS:
        place = tl.atomic_add(counts + e, 1, mask=is_chosen, sem="relaxed")
        tl.store(lists + e * num_tokens + place, pair, mask=is_chosen)


@triton.jit(do_not_specialize=["num_tokens"])
def _choose_kernel(
    selection_bias, logits, chosen, gates, counts, lists, num_tokens, num_experts,
    TOP_K: tl.constexpr, IS_SOFTMAX: tl.constexpr, RENORMALIZES: tl.constexpr, HAS_SELECTION_BIAS: tl.constexpr,
    LISTS_PAIRS: tl.constexpr, EXPERTS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    _choose(
        selection_bias, logits, chosen, gates, counts, lists, num_tokens, num_experts, tl.program_id(0),
        TOP_K, IS_SOFTMAX, RENORMALIZES, HAS_SELECTION_BIAS, LISTS_PAIRS, EXPERTS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _few_kernel(
    x, norm, normed, weight, bias, arrivals, selection_bias, logits, chosen, gates, counts, lists, num_tokens,
    num_experts, width, eps, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr, TOP_K: tl.constexpr, IS_SOFTMAX: tl.constexpr, RENORMALIZES: tl.constexpr,
    HAS_SELECTION_BIAS: tl.constexpr, LISTS_PAIRS: tl.constexpr, EXPERTS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Logits of some experts for one token; the last of a token's programs chooses."""
    let_next_begin(OVERLAPS)
    token = tl.program_id(1)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    c = tl.arange(0, BLOCK_C)
    inside_e, inside_c = e < num_experts, c < width
    w = tl.load(weight + e[:, None] * width + c[None, :], mask=inside_e[:, None] & inside_c[None, :], other=0.0)
    wait_for_inputs(OVERLAPS)
    place = token.to(tl.int64) * width + c
    v = tl.load(x + place, mask=inside_c, other=0.0).to(tl.float32)
    if HAS_NORM:
        element = x.dtype.element_ty
        factor = tl.rsqrt(tl.sum(v * v, axis=0) / width + eps)
        v = (v * factor).to(element).to(tl.float32) * tl.load(norm + c, mask=inside_c, other=0.0).to(tl.float32)
        v = v.to(element)
        if tl.program_id(0) == 0:
            tl.store(normed + place, v, mask=inside_c)
        v = v.to(tl.float32)
    logit = tl.sum(as_float32(w) * v[None, :], axis=1)
    if HAS_BIAS:
        logit += tl.load(bias + e, mask=inside_e, other=0.0)
    tl.store(logits + token.to(tl.int64) * num_experts + e, logit, mask=inside_e)
    tl.debug_barrier()  # all threads have stored before one increments the counter
    if tl.atomic_add(arrivals + token, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(arrivals + token, 0)
        _choose(
            selection_bias, logits, chosen, gates, counts, lists, num_tokens, num_experts, token,
            TOP_K, IS_SOFTMAX, RENORMALIZES, HAS_SELECTION_BIAS, LISTS_PAIRS, EXPERTS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _logits_kernel(
    x, weight, bias, logits, num_tokens, num_experts, width, HAS_BIAS: tl.constexpr, TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr, BLOCK_C: tl.constexpr, NUM_TILES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAPS)
    e = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    t = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    inside_e, inside_t = e < num_experts, t < num_tokens
    total = tl.zeros([TOKENS, EXPERTS], tl.float32)
    for i in range(NUM_TILES):
        c = i * BLOCK_C + tl.arange(0, BLOCK_C)
        inside_c = c < width
        v = tl.load(x + t[:, None] * width + c[None, :], mask=inside_t[:, None] & inside_c[None, :], other=0.0)
        w = tl.load(weight + e[None, :] * width + c[:, None], mask=inside_e[None, :] & inside_c[:, None], other=0.0)
        total = tl.dot(v, w, total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias + e, mask=inside_e, other=0.0)[None, :]
    tl.store(logits + t[:, None] * num_experts + e[None, :], total, mask=inside_t[:, None] & inside_e[None, :])

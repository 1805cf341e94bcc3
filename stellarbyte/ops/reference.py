"""Operations in plain torch, on any device: the reference in the tests of all kernels. Clarity comes before speed."""

import torch

from stellarbyte.forward_batch import ForwardBatch
from stellarbyte.model.logits import soft_cap
from stellarbyte.xpos import Rotation

# T tokens of the step, Q of one sequence, H query heads, G = H/K queries per key head, K key/value heads, D head dim
# B blocks of the cache, M blocks of one sequence, S block size, N = M·S keys of one sequence


def write_kv(
    keys_BSKD: torch.Tensor, values_BSKD: torch.Tensor, slots_T: torch.Tensor, k_TKD: torch.Tensor, v_TKD: torch.Tensor
) -> None:
    """Store the step's keys (already relative to their blocks) and values at their slots."""
    for cache_BSKD, new_TKD in ((keys_BSKD, k_TKD), (values_BSKD, v_TKD)):
        _storage(cache_BSKD).flatten(0, 1).index_copy_(0, slots_T, _storage(_narrowed(new_TKD, cache_BSKD.dtype)))


def _narrowed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Convert to the cache's dtype. fp8 has no infinity: numbers beyond its range become its largest."""
    largest = torch.finfo(dtype).max
    return (x.clamp(-largest, largest) if dtype == torch.float8_e4m3fn else x).to(dtype)


def _storage(x: torch.Tensor) -> torch.Tensor:
    """View fp8 as bytes, which torch can index."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _gather(cache_BSKD: torch.Tensor, blocks_M: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _storage(cache_BSKD)[blocks_M].view(cache_BSKD.dtype).to(dtype)


def paged_attention(
    q_THD: torch.Tensor,
    keys_BSKD: torch.Tensor,
    values_BSKD: torch.Tensor,
    batch: ForwardBatch,
    rotation: Rotation,
    *,
    window: int | None,
    sink_tokens: int,
    softcap: float | None = None,
    softmax_sink_H: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of every token over the live blocks of its own sequence, including its own key. Returns [T, H, D].

    `softmax_sink_H`: one more logit of each head in the softmax, without a value and without the cap.

    Stored keys are moved to a base near the queries (the sequence's first query of the step), which shrinks
    the XPos factors of earlier keys; keys of the step itself are less than one prefill chunk away.
    """
    out_THD = torch.empty_like(q_THD)
    for i in range(len(batch.num_blocks)):
        rows = slice(batch.query_starts[i], batch.query_starts[i + 1])
        blocks_M = batch.block_tables_NM[i, : batch.num_blocks[i]]
        bases_M = batch.block_bases_NM[i, : batch.num_blocks[i]]
        out_THD[rows] = _attend_sequence(
            q_THD[rows],
            batch.positions_T[rows],
            _gather(keys_BSKD, blocks_M, q_THD.dtype),
            _gather(values_BSKD, blocks_M, q_THD.dtype),
            bases_M,
            batch.num_sink_blocks[i],
            batch.reach,
            rotation,
            window,
            sink_tokens,
            softcap,
            softmax_sink_H,
        )
    return out_THD


def _attend_sequence(
    q_QHD: torch.Tensor,
    positions_Q: torch.Tensor,
    keys_MSKD: torch.Tensor,
    values_MSKD: torch.Tensor,
    bases_M: torch.Tensor,
    num_sink_blocks: int,
    reach: int,
    rotation: Rotation,
    window: int | None,
    sink_tokens: int,
    softcap: float | None,
    softmax_sink_H: torch.Tensor | None,
) -> torch.Tensor:
    block_size, sinks = keys_MSKD.shape[1], num_sink_blocks
    key_positions_MS = bases_M[:, None] + torch.arange(block_size, device=bases_M.device)

    base = positions_Q[0]
    shift_MS = (bases_M[sinks:, None] - base).expand(-1, block_size)
    k = rotation.rotate_keys(keys_MSKD[sinks:], shift_MS, reach).flatten(0, 1)
    scores = [_scores(rotation.rotate_queries(q_QHD, positions_Q - base, reach), k)]
    if sinks:  # the window caps their distance, so they have their own rotation
        capped_Q = positions_Q if window is None else positions_Q.clamp(max=window + sink_tokens - 1)
        k_sink = rotation.rotate_keys(keys_MSKD[:sinks], bases_M[:sinks, None].expand(-1, block_size), reach)
        scores.insert(0, _scores(rotation.rotate_queries(q_QHD, capped_Q, reach), k_sink.flatten(0, 1)))
    scores_KGQN = torch.cat(scores, dim=-1) * rotation.score_scale
    if softcap is not None:
        scores_KGQN = soft_cap(scores_KGQN, softcap)

    visible_QN = _visible(positions_Q, key_positions_MS, sinks, window, sink_tokens)
    scores_KGQN = scores_KGQN.masked_fill(~visible_QN, float("-inf"))
    if softmax_sink_H is None:
        weights_KGQN = scores_KGQN.softmax(dim=-1).to(q_QHD.dtype)
    else:
        sink_KGQ1 = softmax_sink_H.float().view(*scores_KGQN.shape[:2], 1, 1).expand(-1, -1, len(q_QHD), 1)
        weights_KGQN = torch.cat((scores_KGQN, sink_KGQ1), dim=-1).softmax(dim=-1)[..., :-1].to(q_QHD.dtype)
    # Invisible slots hold arbitrary numbers, even NaN of an earlier request, which a weight of 0 would not remove.
    values_NKD = values_MSKD.flatten(0, 1).masked_fill(~visible_QN.any(dim=0)[:, None, None], 0)
    out_QKGD = torch.einsum("kgqn,nkd->qkgd", weights_KGQN, values_NKD)
    return out_QKGD.flatten(1, 2)


def _scores(q_QHD: torch.Tensor, k_NKD: torch.Tensor) -> torch.Tensor:
    """Products of every query with every key, [K, G, Q, N] float32."""
    q_QKGD = q_QHD.unflatten(1, (k_NKD.shape[1], -1))
    return torch.einsum("qkgd,nkd->kgqn", q_QKGD.float(), k_NKD.float())


def _visible(
    positions_Q: torch.Tensor, key_positions_MS: torch.Tensor, sinks: int, window: int | None, sink_tokens: int
) -> torch.Tensor:
    """[Q, N] true where a query sees a key. Slots not written yet lie in the query's future; a sink block's unused
    slots lie behind the last sink."""
    m, n = positions_Q[:, None, None], key_positions_MS[None]
    visible = n <= m
    if window is not None:
        visible = visible & (n > m - window)
    visible[:, :sinks] = (n <= m)[:, :sinks] & (n < sink_tokens)[:, :sinks]
    return visible.flatten(1)

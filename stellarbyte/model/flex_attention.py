"""Attention of windows and packed documents by FlexAttention (Dong et al. 2024): blocks without a visible pair are
skipped, and no mask of all pairs is in memory."""

from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from stellarbyte.model.positions import Places

# B sequences, T queries, S keys, H query heads, K key/value heads, D head dim

_compiled: dict[Any, Any] = {}  # torch's functions of FlexAttention, compiled when they first run on a GPU


def block_mask(
    queries: Places, keys: Places, *, window: int | None, sinks: int, has_padding: bool, are_consecutive: bool
) -> BlockMask:
    """Where a query sees a key, as `DenseAttention` defines it.

    Args:
        are_consecutive: every row holds the same positions, counted from 0; then one mask serves all rows.
    """
    (batch, length), num_keys = queries.position_BT.shape, keys.position_BT.shape[1]
    m_BT, n_BS = queries.position_BT.contiguous(), keys.position_BT.contiguous()
    query_document_BT, key_document_BS = queries.document_BT, keys.document_BT

    def is_visible(row: torch.Tensor, _head: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        m, n = (i + (num_keys - length), j) if are_consecutive else (m_BT[row, i], n_BS[row, j])
        visible = (n >= 0) & (n <= m)
        if window is not None:
            visible = visible & ((n > m - window) | (n < sinks))
        if query_document_BT is not None and key_document_BS is not None:
            visible = visible & (query_document_BT[row, i] == key_document_BS[row, j])
        if has_padding:  # a padding query sees all padding, so that no row of the softmax is empty
            visible = visible | ((m < 0) & (n < 0))
        return visible

    rows = None if are_consecutive else batch
    create = _compiled_on_gpus(create_block_mask, m_BT)  # not compiled, it would hold a mask of all pairs
    mask: BlockMask = create(is_visible, rows, None, length, num_keys, device=m_BT.device)
    return mask


def attend(
    q_BTHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    mask: BlockMask,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Softmax attention under the mask, with a soft cap of scores; [B, T, H, D]. On a CPU: slow, no gradients."""

    def capped(score: torch.Tensor, *_indices: torch.Tensor) -> torch.Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    q, k, v = (t.transpose(1, 2) for t in (q_BTHD, k_BSKD, v_BSKD))
    out: torch.Tensor = _compiled_on_gpus(flex_attention, q)(
        q,
        k,
        v,
        score_mod=None if softcap is None else capped,
        block_mask=mask,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2)


def _compiled_on_gpus(function: Any, tensor: torch.Tensor) -> Any:
    if not tensor.is_cuda or torch.compiler.is_compiling():
        return function
    if function not in _compiled:
        _compiled[function] = torch.compile(function)
    return _compiled[function]

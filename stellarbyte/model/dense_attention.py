"""Attention over whole sequences, for training, `forward` and `generate`.

Visibility and distances are those of the numerics: a query at m sees the keys n ≤ m inside the layer's window and
the first `sink_tokens` of the sequence, whose distance never exceeds what the window allows.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from stellarbyte.cache.memory import Memory
from stellarbyte.cache.relative import PrunedCacheLayer, RelativeCache
from stellarbyte.config import ByteModelConfig
from stellarbyte.model import flex_attention
from stellarbyte.model.logits import soft_cap
from stellarbyte.model.positions import Places, Positions
from stellarbyte.xpos import Rotation, XPosRotaryEmbedding

# B sequences, T queries, S keys, M of them of a memory, H query heads, K key/value heads, D head dim

SoftmaxAttention = Callable[..., torch.Tensor]  # `sdpa` or `eager`

XPOS_CHUNK = 2048  # queries that share a base: ζ^(-offset/b) of their own keys stays below 1e3 with the paper's values
_SINK_CHANNELS = 8  # added to heads for a sink of the softmax: fused kernels take multiples of 8
PRUNED_CHUNK = 256  # queries whose attention weights are in memory at once


class DenseAttention:
    """The `attend` of one forward over [B, T] tokens.

    Args:
        positions: of the tokens.
        cache: extended by every layer; None: the T tokens are the whole sequence, but for the memory.
        memory: whose rows every layer reads before the T tokens; None: there are none.
        implementation: "sdpa"; "eager" for plain torch operations, which soft caps and pruned caches always take; or
            "flex_attention" for masks by blocks (windows, documents), without a cache.
        dropout: of attention weights; 0 outside training.

    Raises:
        ValueError: flex attention is asked for with a dropout or with sinks of the softmax.
    """

    def __init__(
        self,
        config: ByteModelConfig,
        rotary: XPosRotaryEmbedding,
        positions: Positions,
        *,
        cache: RelativeCache | None,
        memory: Memory | None,
        implementation: str,
        dropout: float,
    ) -> None:
        self.config = config
        self.rotary = rotary
        self.positions = positions
        self.cache = cache
        # Taken now: recomputed layers read them when the memory has moved on.
        layers = range(config.num_hidden_layers)
        self.memory_positions_M = None if memory is None else [memory.positions(layer) for layer in layers]
        self.eager = partial(eager, softcap=config.attention_softcap)
        if implementation == "flex_attention" and dropout > 0:
            raise ValueError("attention_dropout needs attn_implementation sdpa or eager; flex_attention has none")
        if implementation == "flex_attention" and config.softmax_sink:
            raise ValueError("softmax_sink needs attn_implementation sdpa or eager; flex_attention has none")
        self.implementation = implementation
        self.block_masks: dict[tuple[int | None, int], BlockMask] = {}  # by window and first query
        uses_sdpa = implementation != "eager" and config.attention_softcap is None
        self.softmax_attention: SoftmaxAttention = sdpa if uses_sdpa else self.eager
        self.dropout = dropout

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_sink_H: torch.Tensor | None
    ) -> torch.Tensor:
        window, queries = self.config.windows[layer], self.positions.places
        rotation = self.rotary.of_layer(layer, self.positions.limit + 1)
        keys = queries
        if self.memory_positions_M is not None:
            earlier_M = self.memory_positions_M[layer].to(q.device)
            position_BS = torch.cat((earlier_M.expand(len(q), -1), queries.position_BT), dim=1)
            keys = Places(position_BS, position_BS)
        # Plain rotations may share one base at any length; XPos factors would overflow.
        chunk = XPOS_CHUNK if self.config.use_xpos else q.shape[1]
        softmax_attention: SoftmaxAttention = self.softmax_attention
        if softmax_sink_H is not None:
            if hasattr(softmax_sink_H, "to_local"):  # a DTensor: tensor parallelism divides the heads
                softmax_sink_H = softmax_sink_H.to_local()
            softmax_attention = partial(softmax_attention, sink_BH=softmax_sink_H[None])
        if self.cache is None:
            return self._attend(rotation, window, q, queries, k, v, keys, chunk, softmax_attention)
        held = self.cache.layers[layer]
        num_memory = k.shape[1] - q.shape[1]
        k, v = held.update(k.transpose(1, 2), v.transpose(1, 2), positions=keys.position_BT, num_memory=num_memory)
        if isinstance(held, PrunedCacheLayer):
            return self._attend_pruned(rotation, held, q, k, v, softmax_sink_H)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        keys = Places(held.positions, held.positions)
        return self._attend(rotation, window, q, queries, k, v, keys, chunk, softmax_attention)

    def _attend_pruned(
        self,
        rotation: Rotation,
        held: PrunedCacheLayer,
        q_BTHD: torch.Tensor,
        k_BKSD: torch.Tensor,
        v_BKSD: torch.Tensor,
        softmax_sink_H: torch.Tensor | None,
    ) -> torch.Tensor:
        """Each key head has keys of its own, so it is computed as a sequence of its own, with its group of queries."""
        assert held.positions is not None
        batch, heads = k_BKSD.shape[:2]
        q = q_BTHD.unflatten(2, (heads, -1)).transpose(1, 2).flatten(0, 1)
        k, v = (t.flatten(0, 1).unsqueeze(2) for t in (k_BKSD, v_BKSD))
        query_positions = self.positions.places.position_BT.repeat_interleave(heads, dim=0)
        queries = Places(query_positions, query_positions)
        keys = Places(*[held.positions.flatten(0, 1)] * 2)
        sink = None if softmax_sink_H is None else softmax_sink_H.view(heads, -1).repeat(batch, 1)
        counted = partial(
            self.eager,
            sink_BH=sink,
            on_weights=lambda w: held.add_attention(w.sum(dim=(1, 2)).unflatten(0, (batch, heads))),
        )
        out = self._attend(rotation, held.window, q, queries, k, v, keys, PRUNED_CHUNK, counted)
        held.prune()
        return out.unflatten(0, (batch, heads)).transpose(1, 2).flatten(2, 3)

    def _attend(
        self,
        rotation: Rotation,
        window: int | None,
        q_BTHD: torch.Tensor,
        queries: Places,
        k_BSKD: torch.Tensor,
        v_BSKD: torch.Tensor,
        keys: Places,
        chunk: int,
        softmax_attention: SoftmaxAttention,
    ) -> torch.Tensor:
        """Attention of the last T of S tokens, `chunk` queries at a time."""
        length = q_BTHD.shape[1]
        outputs = []
        for start in range(0, length, chunk):
            stop = min(start + chunk, length)
            num_keys = k_BSKD.shape[1] - (length - stop)  # keys after the chunk's last query are in its future
            k, v = k_BSKD[:, :num_keys], v_BSKD[:, :num_keys]
            of_chunk, seen = queries.between(start, stop), keys.between(0, num_keys)
            q, k = self._rotated(rotation, window, q_BTHD[:, start:stop], of_chunk, k, seen)
            if self._takes_flex_attention(q):
                mask = self._block_mask(window, start, of_chunk, seen)
                outputs.append(
                    flex_attention.attend(q, k, v, mask, rotation.score_scale, self.config.attention_softcap)
                )
                continue
            visible = self._visible(window, of_chunk, seen)
            outputs.append(softmax_attention(q, k, v, visible, rotation.score_scale, self.dropout))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _rotated(
        self,
        rotation: Rotation,
        window: int | None,
        q_BTHD: torch.Tensor,
        queries: Places,
        k_BSKD: torch.Tensor,
        keys: Places,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys relative to the first query."""
        reach = self.positions.limit + 1
        base_B1 = queries.turn_BT[:, :1].clamp(min=0)
        q = rotation.rotate_queries(q_BTHD, queries.turn_BT - base_B1, reach)
        k = rotation.rotate_keys(k_BSKD, keys.turn_BT - base_B1, reach)
        if window is None or self.config.sink_tokens == 0 or self.positions.limit < window:
            return q, k
        # Queries and keys of width 2D: the second half holds the sinks' own distances, the first all other keys'.
        sinks = self.config.sink_tokens
        is_sink = ((keys.position_BT >= 0) & (keys.position_BT < sinks))[:, :, None, None]
        capped = queries.position_BT.clamp(max=window + sinks - 1)
        q_sink = rotation.rotate_queries(q_BTHD, capped, reach)
        k_sink = rotation.rotate_keys(k_BSKD, keys.position_BT.clamp(max=sinks), reach)
        return torch.cat((q, q_sink), -1), torch.cat((k.masked_fill(is_sink, 0), k_sink.masked_fill(~is_sink, 0)), -1)

    def _takes_flex_attention(self, q: torch.Tensor) -> bool:
        """Where it is asked for, without a cache; not for gradients on a CPU, which it does not have there."""
        is_able = self.cache is None and (q.is_cuda or not q.requires_grad)
        return self.implementation == "flex_attention" and is_able

    def _block_mask(self, window: int | None, start: int, queries: Places, keys: Places) -> BlockMask:
        """Made once for all layers with this window."""
        if (window, start) not in self.block_masks:
            self.block_masks[window, start] = flex_attention.block_mask(
                queries,
                keys,
                window=window,
                sinks=self.config.sink_tokens,
                has_padding=self.positions.has_padding,
                are_consecutive=self.positions.are_consecutive,
            )
        return self.block_masks[window, start]

    def _visible(self, window: int | None, queries: Places, keys: Places) -> torch.Tensor | None:
        """[B, 1, T, S] true where a query sees a key; None for plain causal attention."""
        length, num_keys = queries.position_BT.shape[1], keys.position_BT.shape[1]
        reaches_all = window is None or self.positions.limit < window
        if not self.positions.has_padding and queries.document_BT is None and reaches_all and length in (1, num_keys):
            return None
        m, n = queries.position_BT[:, :, None], keys.position_BT[:, None, :]
        visible = (n >= 0) & (n <= m)
        if window is not None:
            visible &= (n > m - window) | (n < self.config.sink_tokens)
        if queries.document_BT is not None and keys.document_BT is not None:
            visible &= queries.document_BT[:, :, None] == keys.document_BT[:, None, :]
        if self.positions.has_padding:  # a padding query sees all padding, so that no row of the softmax is empty
            visible |= (m < 0) & (n < 0)
        return visible[:, None]


def sdpa(
    q_BTHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float,
    dropout: float,
    *,
    sink_BH: torch.Tensor | None = None,
) -> torch.Tensor:
    """torch's fused attention; `visible` None: causal; a single query sees all keys. Returns [B, T, H, D].

    `sink_BH` ([1, H]: of all sequences): one more logit in each head's softmax, without a value.
    """
    if sink_BH is not None:
        q_BTHD, k_BSKD, v_BSKD, visible = _with_sink_key(q_BTHD, k_BSKD, v_BSKD, visible, sink_BH.float() / scale)
    q, k, v = q_BTHD.transpose(1, 2), k_BSKD.transpose(1, 2), v_BSKD.transpose(1, 2)
    causal = visible is None and q.shape[2] > 1
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, visible, dropout, causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)


def _causal(q_BTHD: torch.Tensor, k_BSKD: torch.Tensor) -> torch.Tensor | None:
    """[T, S] true where a query sees a key, of as many keys as queries; None: one query sees all keys."""
    length, num_keys = q_BTHD.shape[1], k_BSKD.shape[1]
    return torch.ones(length, num_keys, dtype=torch.bool, device=q_BTHD.device).tril() if length > 1 else None


def _with_sink_key(
    q_BTHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    visible: torch.Tensor | None,
    product_BH: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """One more key, last, which every query sees, with the given product with each query, and a value of 0.

    Additional channels hold the product, in queries, as the sum of two numbers, since bfloat16 would round one.
    """
    if visible is None:
        visible = _causal(q_BTHD, k_BSKD)
    high_BH = product_BH.to(q_BTHD.dtype)
    low_BH = (product_BH - high_BH.float()).to(q_BTHD.dtype)
    both_BH2 = torch.stack((high_BH, low_BH), dim=-1)[:, None].expand(*q_BTHD.shape[:3], 2)
    q = F.pad(torch.cat((q_BTHD, both_BH2), dim=-1), (0, _SINK_CHANNELS - 2))
    k = F.pad(k_BSKD, (0, _SINK_CHANNELS, 0, 0, 0, 1))
    k[:, -1, :, -_SINK_CHANNELS : -_SINK_CHANNELS + 2] = 1
    return q, k, F.pad(v_BSKD, (0, 0, 0, 0, 0, 1)), None if visible is None else F.pad(visible, (0, 1), value=True)


def eager(
    q_BTHD: torch.Tensor,
    k_BSKD: torch.Tensor,
    v_BSKD: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float,
    dropout: float,
    *,
    sink_BH: torch.Tensor | None = None,
    softcap: float | None = None,
    on_weights: Callable[[torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """`sdpa` as plain torch operations, softmax in float32, with a soft cap of scores, not of sinks.

    `on_weights` gets the weights [B, H, T, S], detached.
    """
    groups = q_BTHD.shape[2] // k_BSKD.shape[2]
    k, v = k_BSKD.repeat_interleave(groups, dim=2), v_BSKD.repeat_interleave(groups, dim=2)
    scores_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHD, k).float() * scale
    if softcap is not None:
        scores_BHTS = soft_cap(scores_BHTS, softcap)
    if visible is None:
        visible = _causal(q_BTHD, k_BSKD)
    if visible is not None:
        scores_BHTS = scores_BHTS.masked_fill(~visible, float("-inf"))
    if sink_BH is None:
        weights_BHTS = scores_BHTS.softmax(dim=-1)
    else:
        sink_BHT1 = sink_BH.float()[:, :, None, None].expand(*scores_BHTS.shape[:3], 1)
        weights_BHTS = torch.cat((scores_BHTS, sink_BHT1), dim=-1).softmax(dim=-1)[..., :-1]
    if on_weights is not None:
        on_weights(weights_BHTS.detach())
    return torch.einsum("bhts,bshd->bthd", F.dropout(weights_BHTS.to(v.dtype), dropout), v)

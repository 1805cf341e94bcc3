"""Attention over the paged cache, for the kinds of rows that a step has."""

from dataclasses import dataclass

import torch

from stellarbyte.backends.gpu.model import Attend, TritonModel
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.ops.triton.attention import (
    DecodeScratch,
    decode_attention,
    num_splits_for,
    prefill_attention,
    write_kv,
)
from stellarbyte.ops.triton.lora import Addend
from stellarbyte.ops.triton.paged import PagedRows, Rotations

# T tokens, N = (H + 2K) · D packed row, A = H · D, X tiles


@dataclass(frozen=True, kw_only=True)
class PagedAttention:
    """Writes keys and values of a step's rows, and attends to all that they see. `rotations`: of each layer."""

    model: TritonModel
    cache: PagedKVCache
    rotations: list[Rotations]
    scratch: DecodeScratch
    num_multiprocessors: int

    def of_prompts(self, rows: PagedRows, tile_starts_X: torch.Tensor, tile_counts_X: torch.Tensor) -> Attend:
        """Of many tokens of each sequence."""
        model, config = self.model, self.model.config

        def attend(layer: int, qkv_TN: torch.Tensor, addend: Addend | None) -> torch.Tensor:
            assert addend is None, "prompts add adapters in place"
            weights = model.layers[layer]
            self._write(layer, qkv_TN, rows)
            out_TA = self._empty(qkv_TN)
            prefill_attention(
                qkv_TN, out_TA, self.cache.keys_LBSKD[layer], self.cache.values_LBSKD[layer], rows, tile_starts_X,
                tile_counts_X, self.rotations[layer], model.heads, window=weights.window,
                sink_tokens=config.sink_tokens, score_scale=model.score_scales[layer],
                softcap=config.attention_softcap, softmax_sink_H=weights.softmax_sink_H, q_norm_D=weights.q_norm_D,
                norm_eps=config.rms_norm_eps,
            )  # fmt: skip
            return out_TA

        return attend

    def of_newest(self, rows: PagedRows) -> Attend:
        """Of the newest token of each sequence: the fewer rows, the more programs share one."""
        num_splits = num_splits_for(len(rows.positions_T), self.model.heads.num_kv_heads, self.num_multiprocessors)
        return lambda layer, qkv_TN, addend: self._by_row(layer, qkv_TN, addend, rows, num_splits)

    def of_few(self, rows: PagedRows) -> Attend:
        """Of few tokens of each sequence: each shares its keys among as many programs as in decoding, where a tile of
        a prompt would have one for each head, however long the context is."""
        return self._of_written(
            rows, num_splits_for(len(rows.positions_T), self.model.heads.num_kv_heads, self.num_multiprocessors)
        )

    def of_any(self, rows: PagedRows) -> Attend:
        """Of newest tokens and of prompts, each row and kv head by one program: the bits of a row depend on its own
        query, keys and values only."""
        return self._of_written(rows, 1)

    def _of_written(self, rows: PagedRows, num_splits: int) -> Attend:
        def attend(layer: int, qkv_TN: torch.Tensor, addend: Addend | None) -> torch.Tensor:
            assert addend is None, "adapters are added in place"
            self._write(layer, qkv_TN, rows)
            return self._by_row(layer, qkv_TN, None, rows, num_splits, stores=False)

        return attend

    def _write(self, layer: int, qkv_TN: torch.Tensor, rows: PagedRows) -> None:
        model, config = self.model, self.model.config
        write_kv(
            qkv_TN, self.cache.keys_LBSKD[layer], self.cache.values_LBSKD[layer], rows, self.rotations[layer],
            model.heads, sink_tokens=config.sink_tokens, k_norm_D=model.layers[layer].k_norm_D,
            norm_eps=config.rms_norm_eps,
        )  # fmt: skip

    def _by_row(
        self,
        layer: int,
        qkv_TN: torch.Tensor,
        addend: Addend | None,
        rows: PagedRows,
        num_splits: int,
        *,
        stores: bool = True,
    ) -> torch.Tensor:
        model, config = self.model, self.model.config
        weights, out_TA = model.layers[layer], self._empty(qkv_TN)
        decode_attention(
            qkv_TN, out_TA, self.cache.keys_LBSKD[layer], self.cache.values_LBSKD[layer], rows, self.scratch,
            self.rotations[layer], model.heads, window=weights.window, sink_tokens=config.sink_tokens,
            score_scale=model.score_scales[layer], softcap=config.attention_softcap,
            softmax_sink_H=weights.softmax_sink_H, q_norm_D=weights.q_norm_D, k_norm_D=weights.k_norm_D,
            norm_eps=config.rms_norm_eps, num_splits=num_splits, addend=addend, stores=stores,
        )  # fmt: skip
        return out_TA

    def _empty(self, qkv_TN: torch.Tensor) -> torch.Tensor:
        return qkv_TN.new_empty(len(qkv_TN), self.model.heads.num_heads * self.model.heads.head_dim)

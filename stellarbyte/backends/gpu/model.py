"""A ByteTransformer on the GPU kernels: packs the weights once, then computes steps. Knows no requests, no graphs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F

from stellarbyte.backends.gpu.adapters import Adapters
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.config import ByteModelConfig
from stellarbyte.lora.bank import SHARED_INPUTS, LoraBank
from stellarbyte.model.decoder import ByteDecoderLayer, ByteLanguageModel
from stellarbyte.model.residual import deepnorm_alpha
from stellarbyte.ops.triton.attention import prefill_attention, write_kv
from stellarbyte.ops.triton.fp8 import product, takes_fp8
from stellarbyte.ops.triton.gates import GATES, apply_gate
from stellarbyte.ops.triton.linear import MAX_NORMED_ROWS, is_for_few, linear
from stellarbyte.ops.triton.lora import Addend
from stellarbyte.ops.triton.norm import add_branch, add_norm
from stellarbyte.ops.triton.paged import HeadShape, PagedRows, Rotations
from stellarbyte.ops.triton.weights import Weight, dequantized, quantize

# T tokens, C hidden size, R rows of some of them, V vocabulary, A = heads · head dim, N = A + keys and values

Attend = Callable[[int, torch.Tensor, Addend | None], torch.Tensor]  # layer, packed q|k|v [T, N] → [T, A]

_QKV, _OUTPUT, _GATE_UP, _DOWN = SHARED_INPUTS


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer's weights, projections that share an input packed into one."""

    qkv: Weight
    output: Weight
    gate_up: Weight
    down: Weight
    input_norm_C: torch.Tensor
    mlp_norm_C: torch.Tensor | None  # None: attention and MLP in parallel
    q_norm_D: torch.Tensor | None
    k_norm_D: torch.Tensor | None
    attention_scale_C: torch.Tensor | None  # LayerScale
    mlp_scale_C: torch.Tensor | None
    window: int | None


class TritonModel:
    """The weights of a `ByteLanguageModel`, packed; quantized, its own matrices are gone after. Engine thread only.

    Args:
        config: the one to serve with; its windows and sinks may differ from the model's own.
        bank: the adapters, in the model's dtype; None: there are none.
        quantization: "none", or "int8" or "fp8": of all matrices but the embedding, a scale for each output; the head
            is int8 then.
    """

    def __init__(
        self,
        model: ByteLanguageModel,
        config: ByteModelConfig,
        bank: LoraBank | None = None,
        *,
        quantization: str = "none",
    ) -> None:
        decoder = model.model
        assert config.num_key_value_heads is not None and config.head_dim is not None  # the config fills both in
        self.config = config
        self.bank = LoraBank(config) if bank is None else bank
        self.embedding_VC = decoder.embed_tokens.weight
        self.device = self.embedding_VC.device
        self.final_norm_C = decoder.norm.weight
        head_weight = Weight(matrix_NK=model.lm_head.weight)
        # The head's errors reach every token's logit directly, and fp8 has the larger ones.
        self.head_weight = head_weight if quantization == "none" else quantize(head_weight, "int8")
        self.layers = [
            _pack(cast(ByteDecoderLayer, layer), config, i, quantization) for i, layer in enumerate(decoder.layers)
        ]
        self.heads = HeadShape(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.gate = GATES[config.hidden_act]
        self.score_scale = decoder.rotary.score_scale
        self.alpha = deepnorm_alpha(config) if config.deepnorm else None
        self._rotary = decoder.rotary
        self._rotations: Rotations | None = None

    def head(self, hidden_RC: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[R, V] logits of what follows, in `out` if it is given."""
        return _apply(hidden_RC.contiguous(), self.head_weight, out)

    def rotations(self, distance: int) -> Rotations:
        """Tables for distances up to `distance`."""
        if self._rotations is None or len(self._rotations.cos_OD) <= distance:
            cos_OD, sin_OD = self._rotary.cache.tables(distance + 1, self.device)
            log_decay_D = self._rotary.log_decay(self.device)
            self._rotations = Rotations(cos_OD, sin_OD, None if log_decay_D is None else log_decay_D.contiguous())
        return self._rotations

    def prefill(
        self,
        cache: PagedKVCache,
        rows: PagedRows,
        tile_starts_X: torch.Tensor,
        tile_counts_X: torch.Tensor,
        rotations: Rotations,
    ) -> Attend:
        """Attention of many tokens of each sequence."""

        def attend(layer: int, qkv_TN: torch.Tensor, addend: Addend | None) -> torch.Tensor:
            assert addend is None, "adapters of prompts add in place"
            weights, keys, values = self.layers[layer], cache.keys_LBSKD[layer], cache.values_LBSKD[layer]
            eps, sink_tokens = self.config.rms_norm_eps, self.config.sink_tokens
            write_kv(
                qkv_TN, keys, values, rows, rotations, self.heads,
                sink_tokens=sink_tokens, k_norm_D=weights.k_norm_D, norm_eps=eps,
            )  # fmt: skip
            out_TA = qkv_TN.new_empty(len(qkv_TN), self.heads.num_heads * self.heads.head_dim)
            prefill_attention(
                qkv_TN, out_TA, keys, values, rows, tile_starts_X, tile_counts_X, rotations, self.heads,
                window=weights.window, sink_tokens=sink_tokens, score_scale=self.score_scale,
                q_norm_D=weights.q_norm_D, norm_eps=eps,
            )  # fmt: skip
            return out_TA

        return attend

    # The layers

    def forward(self, x_TC: torch.Tensor, attend: Attend, adapters: Adapters | None) -> torch.Tensor:
        """Token embeddings → hidden states after the final norm; x_TC may be written to."""
        is_plain = adapters is None and self.alpha is None and not self.config.parallel_residual
        if is_plain and len(x_TC) <= MAX_NORMED_ROWS and is_for_few(x_TC, self.layers[0].qkv):
            return self._forward_few(x_TC, attend)
        return self._forward_many(x_TC, attend, adapters)

    def _forward_few(self, x_TC: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Few rows: norms, gates and residuals are parts of the products."""
        eps = self.config.rms_norm_eps
        for i, layer in enumerate(self.layers):
            assert layer.mlp_norm_C is not None
            attended_TA = attend(i, linear(x_TC, layer.qkv, norm_K=layer.input_norm_C, eps=eps), None)
            x_TC = linear(attended_TA, layer.output, residual_TN=x_TC, branch_scale_N=layer.attention_scale_C)
            inner_TI = linear(x_TC, layer.gate_up, norm_K=layer.mlp_norm_C, eps=eps, gate=self.gate)
            x_TC = linear(inner_TI, layer.down, residual_TN=x_TC, branch_scale_N=layer.mlp_scale_C)
        return add_norm(x_TC, None, self.final_norm_C, eps)

    def _forward_many(self, x_TC: torch.Tensor, attend: Attend, adapters: Adapters | None) -> torch.Tensor:
        eps, alpha = self.config.rms_norm_eps, self.alpha
        normed_TC = x_TC if alpha is not None else add_norm(x_TC, None, self.layers[0].input_norm_C, eps)
        for i, layer in enumerate(self.layers):
            attended_TA = attend(i, *self._project(normed_TC, layer.qkv, i, _QKV, adapters))
            attention_TC, addend = self._project(attended_TA, layer.output, i, _OUTPUT, adapters)
            if layer.mlp_norm_C is None:  # in parallel: both read the same norm
                source_TC = normed_TC.clone() if alpha is not None else normed_TC
                add_branch(x_TC, attention_TC, layer.attention_scale_C, alpha, addend)
            elif alpha is not None:
                source_TC = add_norm(
                    x_TC, attention_TC, layer.input_norm_C, eps, branch_scale_C=layer.attention_scale_C, alpha=alpha,
                    addend=addend,
                )  # fmt: skip
            else:
                source_TC = add_norm(
                    x_TC, attention_TC, layer.mlp_norm_C, eps, branch_scale_C=layer.attention_scale_C, addend=addend
                )
            gate_up_TI, addend = self._project(source_TC, layer.gate_up, i, _GATE_UP, adapters)
            inner_TI = apply_gate(gate_up_TI, self.gate, addend)
            mlp_TC, addend = self._project(inner_TI, layer.down, i, _DOWN, adapters)
            if alpha is not None:
                norm_C = layer.input_norm_C if layer.mlp_norm_C is None else layer.mlp_norm_C
                normed_TC = add_norm(
                    x_TC, mlp_TC, norm_C, eps, branch_scale_C=layer.mlp_scale_C,
                    alpha=1.0 if layer.mlp_norm_C is None else alpha, addend=addend,
                )  # fmt: skip
            else:
                norm_C = self.layers[i + 1].input_norm_C if i + 1 < len(self.layers) else self.final_norm_C
                normed_TC = add_norm(x_TC, mlp_TC, norm_C, eps, branch_scale_C=layer.mlp_scale_C, addend=addend)
        return normed_TC if alpha is None else add_norm(x_TC, None, self.final_norm_C, eps)

    def _project(
        self, x_TK: torch.Tensor, weight: Weight, layer: int, projections: slice, adapters: Adapters | None
    ) -> tuple[torch.Tensor, Addend | None]:
        """The product, and what its reader has to add to it."""
        if adapters is None:
            return _apply(x_TK, weight), None
        adapters.begin(x_TK, layer, projections)
        out_TN = _apply(x_TK, weight)
        return out_TN, adapters.end(out_TN, layer, projections)


def _apply(x_TK: torch.Tensor, weight: Weight, out_TN: torch.Tensor | None = None) -> torch.Tensor:
    if is_for_few(x_TK, weight):
        return linear(x_TK, weight, out_TN=out_TN)
    if takes_fp8(x_TK, weight):
        product_TN = product(x_TK, weight)
        return product_TN if out_TN is None else out_TN.copy_(product_TN)
    matrix_NK = dequantized(weight, x_TK.dtype)
    if out_TN is not None and weight.bias_N is None:
        return torch.mm(x_TK, matrix_NK.T, out=out_TN)
    product_TN = F.linear(x_TK, matrix_NK, weight.bias_N)
    return product_TN if out_TN is None else out_TN.copy_(product_TN)


def _pack(layer: ByteDecoderLayer, config: ByteModelConfig, number: int, quantization: str) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp

    def vector(module: torch.nn.Module | None) -> torch.Tensor | None:
        return None if module is None else cast(torch.Tensor, module.weight)

    def pack(*parts: torch.nn.Linear) -> Weight:
        """The matrices of linears below each other. They get views of it, or nothing: no memory is held twice."""
        heights = [len(part.weight) for part in parts]
        matrix_NK = parts[0].weight if len(parts) == 1 else torch.cat([part.weight.data for part in parts])
        bias_N = None if parts[0].bias is None else torch.cat([part.bias.data for part in parts])
        weight = Weight(matrix_NK=matrix_NK, bias_N=bias_N)
        if quantization != "none":
            weight, matrix_NK = quantize(weight, quantization), matrix_NK.new_empty(sum(heights), 0)
        for part, rows in zip(parts, matrix_NK.split(heights), strict=True):
            part.weight = torch.nn.Parameter(rows, requires_grad=False)
        return weight

    return Layer(
        qkv=pack(attention.q_proj, attention.k_proj, attention.v_proj),
        output=pack(attention.o_proj),
        gate_up=pack(mlp.gate_proj, mlp.up_proj),
        down=pack(mlp.down_proj),
        input_norm_C=layer.input_layernorm.weight,
        mlp_norm_C=vector(layer.post_attention_layernorm),
        q_norm_D=vector(attention.q_norm),
        k_norm_D=vector(attention.k_norm),
        attention_scale_C=vector(layer.attention_scale),
        mlp_scale_C=vector(layer.mlp_scale),
        window=config.windows[number],
    )

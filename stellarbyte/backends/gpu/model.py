"""A ByteTransformer on the GPU kernels: packs the weights once, then computes steps."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F

from stellarbyte.backends.gpu.adapters import Adapters
from stellarbyte.backends.gpu.expert_weights import ExpertLayer
from stellarbyte.backends.gpu.layer_weights import Layer, pack_layer, part_of
from stellarbyte.backends.gpu.matrices import GpuMatrices
from stellarbyte.backends.gpu.products import (
    PackedWeight,
    apply,
    apply_invariant,
    can_norm_few,
    few,
    fuses_gate,
    on_cpu,
    rows_of,
)
from stellarbyte.backends.gpu.replaced import add_logits
from stellarbyte.checkpoint.quantized.matrix import QuantizedMatrix
from stellarbyte.config import ByteModelConfig
from stellarbyte.lora.bank import EMBEDDING, HEAD, LoraBank
from stellarbyte.model.decoder import ByteLanguageModel
from stellarbyte.model.parts import ATTENDED, ATTENTION_INPUT, GATED, MLP_INPUT
from stellarbyte.model.residual import deepnorm_alpha
from stellarbyte.ops.triton.gates import GATES, apply_gate, finish_logits
from stellarbyte.ops.triton.lora import Addend, LoraRows
from stellarbyte.ops.triton.moe.layer import has_terms, make_scratch, moe, terms
from stellarbyte.ops.triton.moe.scratch import ExpertScratch
from stellarbyte.ops.triton.norm import add_branch, add_norm
from stellarbyte.ops.triton.paged import HeadShape, Rotations
from stellarbyte.ops.triton.rotate_write import norm_projections
from stellarbyte.ops.triton.weights import Weight
from stellarbyte.parallel.gpu_ranks import GpuRanks

# T tokens, C hidden size, R rows of some of them, V vocabulary, A = heads · head dim, N = A + keys and values

_MAX_EXPERT_ROWS = 4096  # tokens that a layer's experts compute together: enough for full tiles

Attend = Callable[[int, torch.Tensor, Addend | None], torch.Tensor]  # layer, packed q|k|v [T, N] → [T, A]


class Branch(NamedTuple):
    """The output of attention or MLP, not yet scaled and added to the residual stream."""

    out_TC: torch.Tensor  # or [T · J, C], the terms of its rows' sums
    addend: Addend | None  # part of the output; valid until the next product
    norm_C: torch.Tensor | None  # RMSNorm of the output, before the scale
    scale_C: torch.Tensor | None
    counts_E: torch.Tensor | None = None  # to be set to 0 when the branch is read


class TritonModel:
    """The packed weights of a `ByteLanguageModel`. Quantization frees its own matrices. Engine thread only.

    Args:
        config: for serving; its windows and sinks may differ from the model's own.
        bank: the adapters, in the model's dtype; None: no adapters.
        quantization: "none", or of all matrices but the embedding "int8" or "fp8", with a scale for each output, or
            "int4", with a scale and a zero point for 32 inputs; the head is then int8.
        is_invariant: the numbers of a sequence do not depend on the rest of a step, bit for bit: every sum has one
            order, whatever is fastest for a number of rows.
        kept: the quantized matrices of a checkpoint, by the names of their parameters, as in `GpuMatrices`.
        ranks: those that compute the model together, each with its own `model`, `config` and `bank`; None: this alone.

    Attributes:
        quantization: of the matrices of its layers, or "none".
        keeps_layers, keeps_head: whether their matrices have the numbers of `kept`.

    Raises:
        ValueError: the kernels do not support a part of the model, or the quantization does not fit its shape.
    """

    def __init__(
        self,
        model: ByteLanguageModel,
        config: ByteModelConfig,
        bank: LoraBank | None = None,
        *,
        quantization: str = "none",
        is_invariant: bool = False,
        kept: Mapping[str, QuantizedMatrix] = MappingProxyType({}),
        ranks: GpuRanks | None = None,
    ) -> None:
        decoder = model.model
        assert config.num_key_value_heads is not None and config.head_dim is not None  # the config fills both in
        self.config = config
        self.is_invariant = is_invariant
        self._apply = apply_invariant if is_invariant else apply
        self.ranks = ranks
        self.bank = LoraBank(config) if bank is None else bank
        self.embedding_VC = decoder.embed_tokens.weight
        self.device = self.embedding_VC.device
        self.embedding_multiplier = float(self.embedding_VC.new_tensor(config.embedding_multiplier))
        self.final_norm_C = decoder.norm.gain
        matrices = GpuMatrices(model, config, kept, quantization)
        self.quantization = matrices.quantization
        self.keeps_layers, self.keeps_head = matrices.is_kept, matrices.keeps_head
        self.head_weight = matrices.head()
        self.layers: list[Layer] = []
        for layer in range(config.num_hidden_layers):
            self.layers.append(pack_layer(model, config, layer, matrices, self.layers))
        # The fused kernels of few rows add the sum of a token's experts to the residual: nothing may come between.
        self.can_fuse = not any(
            layer.experts is not None and (layer.experts.shared is not None or layer.mlp_output_norm_C is not None)
            for layer in self.layers
        )
        forms = {type(weight) for layer in self.layers for weight in layer.matrices}
        # Of several forms, some take a norm for fewer rows than others. A sum over ranks comes between.
        self.can_fuse = self.can_fuse and len(forms) == 1 and not is_invariant and ranks is None
        self.heads = HeadShape(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.gate = GATES[config.hidden_act]
        num_layers = range(config.num_hidden_layers)
        self.score_scales = [decoder.rotary.of_layer(i, config.context_length).score_scale for i in num_layers]
        self.alpha = deepnorm_alpha(config) if config.deepnorm else None
        self._places = {name: (layer, number) for layer, number, name in self.bank.projections.modules()}
        self._rotary = decoder.rotary
        self._rotations: list[Rotations] = []

    def with_windows_of(self, config: ByteModelConfig) -> Self:
        """The same weights, served with the windows and sinks of `config`."""
        other = copy.copy(self)
        other.config = config
        other._rotations = []
        other.layers = [
            dataclasses.replace(layer, window=window) for layer, window in zip(self.layers, config.windows, strict=True)
        ]
        return other

    def alone(self) -> Self:
        """The same weights without other ranks: for programs that run to compile their kernels or to be measured."""
        other = copy.copy(self)
        other.ranks = None if self.ranks is None else self.ranks.alone()
        return other

    def weight(self, module: str) -> torch.Tensor:
        """The weight of an adaptable module [out, in], the head or the embedding [V, C], as steps multiply by it;
        if quantized in float32, the head then on the CPU. Any thread."""
        if module == EMBEDDING:
            return self.embedding_VC.detach()
        if module == HEAD:
            is_plain = isinstance(self.head_weight, Weight) and self.head_weight.scales_N is None
            # On the CPU if quantized: in float32 it takes gigabytes.
            return rows_of(self.head_weight if is_plain else on_cpu(self.head_weight), slice(None)).detach()
        layer, number = self._places[module]
        return part_of(self.layers[layer], self.bank.projections, layer, number).detach()

    def head(
        self, hidden_RC: torch.Tensor, out: torch.Tensor | None = None, adapters: LoraRows | None = None
    ) -> torch.Tensor:
        """[R, V] logits of the next token, in `out` if given; `adapters` are those of the rows, None: none has a
        head."""
        hidden_RC = hidden_RC.contiguous()
        if self.ranks is None:
            logits_RV = self._apply(hidden_RC, self.head_weight, out)
        else:
            logits_RV = self.ranks.gather_logits(self._apply(hidden_RC, self.head_weight), out)
        if adapters is not None:
            add_logits(logits_RV, hidden_RC, adapters, self.bank)
        if self.config.logits_multiplier != 1 or self.config.logits_softcap is not None:
            finish_logits(logits_RV, self.config.logits_multiplier, self.config.logits_softcap)
        return logits_RV

    def embed(self, token_ids_T: torch.Tensor) -> torch.Tensor:
        """[T, C] embeddings of tokens."""
        if self.ranks is None:
            x_TC = F.embedding(token_ids_T, self.embedding_VC)
        else:
            x_TC = self.ranks.embed(token_ids_T, self.embedding_VC)
        return x_TC if self.embedding_multiplier == 1 else x_TC * self.embedding_multiplier

    def rotations(self, distance: int) -> list[Rotations]:
        """The tables of each layer for distances up to `distance`; layers with one rotation share them."""
        if not self._rotations or len(self._rotations[0].cos_OD) <= distance:
            kinds = [self._rotary.of_layer(i, self.config.context_length) for i in range(len(self.layers))]
            tables: dict[int, Rotations] = {}
            for kind in kinds:
                if id(kind) not in tables:
                    log_decay_D = kind.log_decay(self.device)
                    tables[id(kind)] = Rotations(
                        *kind.cache.tables(distance + 1, self.device),
                        None if log_decay_D is None else log_decay_D.contiguous(),
                        None if kind.query_gain is None else kind.query_gain.to(self.device),
                    )
            self._rotations = [tables[id(kind)] for kind in kinds]
        return self._rotations

    def make_expert_scratch(self, max_rows: int) -> ExpertScratch | None:
        """For `forward` on one stream, of up to `max_rows` tokens; None: no layer has experts."""
        layers = [layer.experts for layer in self.layers if layer.experts is not None]
        return make_scratch(min(max_rows, _MAX_EXPERT_ROWS), layers[0].router, layers[0].experts) if layers else None

    # The layers

    def forward(
        self, x_TC: torch.Tensor, attend: Attend, adapters: Adapters | None, expert_scratch: ExpertScratch | None
    ) -> torch.Tensor:
        """Token embeddings → hidden states after the final norm; x_TC may be written to."""
        is_plain = adapters is None and self.alpha is None and not self.config.parallel_residual
        if is_plain and self.can_fuse and can_norm_few(x_TC, self.layers[0].qkv):
            return self._forward_few(x_TC, attend, expert_scratch)
        return self._forward_many(x_TC, attend, adapters, expert_scratch)

    def _forward_few(self, x_TC: torch.Tensor, attend: Attend, expert_scratch: ExpertScratch | None) -> torch.Tensor:
        """Few rows: norms, gates and residuals are fused into the products."""
        for i in range(len(self.layers)):
            x_TC = self._attention_of_few(x_TC, i, attend)
            x_TC = self._mlp_of_few(x_TC, i, expert_scratch)
        return add_norm(x_TC, None, self.final_norm_C, self.config.rms_norm_eps)

    def _attention_of_few(self, x_TC: torch.Tensor, i: int, attend: Attend) -> torch.Tensor:
        """x + the attention branch of layer i, added by its last product."""
        layer, eps = self.layers[i], self.config.rms_norm_eps
        qkv_TN = few(x_TC, layer.qkv, norm_K=layer.input_norm_C, eps=eps)
        attended_TA = attend(i, *self._normed_projections(qkv_TN, None, layer))
        return self._add_product(
            x_TC, attended_TA, layer.output, layer.attention_output_norm_C, layer.attention_scale_C
        )

    def _mlp_of_few(self, x_TC: torch.Tensor, i: int, expert_scratch: ExpertScratch | None) -> torch.Tensor:
        """x + the MLP branch of layer i, added by its last product."""
        layer, eps = self.layers[i], self.config.rms_norm_eps
        if layer.experts is not None:
            assert expert_scratch is not None
            return moe(
                x_TC, layer.experts.router, layer.experts.experts, expert_scratch, gate=self.gate,
                norm_C=layer.mlp_norm_C, eps=eps, residual_TC=x_TC, branch_scale_C=layer.mlp_scale_C,
            )  # fmt: skip
        assert layer.gate_up is not None and layer.down is not None
        inner_TI = few(x_TC, layer.gate_up, norm_K=layer.mlp_norm_C, eps=eps, gate=self.gate)
        return self._add_product(x_TC, inner_TI, layer.down, layer.mlp_output_norm_C, layer.mlp_scale_C)

    def _add_product(
        self,
        x_TC: torch.Tensor,
        inner_TK: torch.Tensor,
        weight: PackedWeight,
        norm_C: torch.Tensor | None,
        scale_C: torch.Tensor | None,
    ) -> torch.Tensor:
        """x + scale · norm(W · inner); with a norm x is changed in place."""
        if norm_C is None:
            return few(inner_TK, weight, residual_TN=x_TC, branch_scale_N=scale_C)
        add_branch(x_TC, few(inner_TK, weight), scale_C, branch_norm_C=norm_C, eps=self.config.rms_norm_eps)
        return x_TC

    def _forward_many(
        self, x_TC: torch.Tensor, attend: Attend, adapters: Adapters | None, expert_scratch: ExpertScratch | None
    ) -> torch.Tensor:
        """Many rows: the kernel of the next branch's norm adds a branch to the residual stream."""
        norms = [layer.input_norm_C for layer in self.layers]
        source_TC = x_TC
        if self.alpha is None and norms[0] is not None:
            source_TC = add_norm(x_TC, None, norms[0], self.config.rms_norm_eps)
        for i, layer in enumerate(self.layers):
            own_norm_C, next_norm_C = layer.input_norm_C, norms[i + 1] if i + 1 < len(norms) else self.final_norm_C
            alpha = self.alpha
            branch = self._attention(source_TC, i, attend, adapters)
            if self.config.parallel_residual:  # the MLP has the same input, and the next norm follows both sums
                source_TC = source_TC.clone() if alpha is not None else source_TC
                add_branch(x_TC, branch.out_TC, branch.scale_C, alpha, branch.addend)
                alpha = None if alpha is None else 1.0
            else:
                source_TC = self._add(x_TC, branch, own_norm_C, layer.mlp_norm_C, alpha)
                own_norm_C = layer.mlp_norm_C
            branch = self._mlp(source_TC, i, adapters, expert_scratch)
            source_TC = self._add(x_TC, branch, own_norm_C, next_norm_C, alpha)
        return source_TC if self.alpha is None else add_norm(x_TC, None, self.final_norm_C, self.config.rms_norm_eps)

    def _attention(self, x_TC: torch.Tensor, i: int, attend: Attend, adapters: Adapters | None) -> Branch:
        """The attention branch of layer i for its input x."""
        layer = self.layers[i]
        qkv_TN, addend = self._project(x_TC, layer.qkv, i, ATTENTION_INPUT, adapters)
        attended_TA = attend(i, *self._normed_projections(qkv_TN, addend, layer))
        out_TC, addend = self._sum(*self._project(attended_TA, layer.output, i, ATTENDED, adapters))
        return Branch(out_TC, addend, layer.attention_output_norm_C, layer.attention_scale_C)

    def _normed_projections(
        self, qkv_TN: torch.Tensor, addend: Addend | None, layer: Layer
    ) -> tuple[torch.Tensor, Addend | None]:
        """q | k | v and what is still to be added to them, after norms over all heads of q and of k, if there are."""
        if layer.qk_norm_N is None:
            return qkv_TN, addend
        norm = norm_projections if self.ranks is None else self.ranks.norm_projections
        norm(qkv_TN, layer.qk_norm_N, self.heads, self.config.rms_norm_eps, addend)
        return qkv_TN, None

    def _mlp(
        self, x_TC: torch.Tensor, i: int, adapters: Adapters | None, expert_scratch: ExpertScratch | None
    ) -> Branch:
        """The MLP branch of layer i for its input x."""
        layer = self.layers[i]
        if layer.experts is not None:
            assert expert_scratch is not None
            norm_C, scale_C = layer.mlp_output_norm_C, layer.mlp_scale_C
            has_sum_only = layer.experts.shared is not None or self.is_invariant or self.ranks is not None
            if not has_sum_only and has_terms(x_TC, expert_scratch):
                router, experts = layer.experts.router, layer.experts.experts
                out_PC = terms(x_TC, router, experts, expert_scratch, gate=self.gate)
                return Branch(out_PC, None, norm_C, scale_C, expert_scratch.counts)
            return Branch(*self._sum(self._experts(x_TC, layer.experts, expert_scratch), None), norm_C, scale_C)
        assert layer.gate_up is not None and layer.down is not None
        if adapters is None and not self.is_invariant and fuses_gate(x_TC, layer.gate_up):
            inner_TI = few(x_TC, layer.gate_up, gate=self.gate)
        else:
            gate_up_TI, addend = self._project(x_TC, layer.gate_up, i, MLP_INPUT, adapters)
            inner_TI = apply_gate(gate_up_TI, self.gate, addend)
        out_TC, addend = self._sum(*self._project(inner_TI, layer.down, i, GATED, adapters))
        return Branch(out_TC, addend, layer.mlp_output_norm_C, layer.mlp_scale_C)

    def _experts(self, x_TC: torch.Tensor, layer: ExpertLayer, scratch: ExpertScratch) -> torch.Tensor:
        """The sum of the chosen experts and the shared one."""
        shared_TC = None
        if layer.shared is not None:
            inner_TI = apply_gate(self._apply(x_TC, layer.shared.gate_up), self.gate)
            shared_TC = self._apply(inner_TI, layer.shared.down)
            if layer.shared.gate_1C is not None:
                shared_TC *= self._apply(x_TC, Weight(matrix_NK=layer.shared.gate_1C)).sigmoid()
        return moe(
            x_TC, layer.router, layer.experts, scratch, gate=self.gate, residual_TC=shared_TC,
            is_invariant=self.is_invariant,
        )  # fmt: skip

    def _add(
        self,
        x_TC: torch.Tensor,
        branch: Branch,
        own_norm_C: torch.Tensor | None,
        next_norm_C: torch.Tensor | None,
        alpha: float | None,
    ) -> torch.Tensor:
        """Add a branch to the residual stream x in place; returns the input of the next branch.

        With DeepNorm (`alpha`) that is the sum after the branch's own norm; without, the sum after the next branch's
        norm, or the sum itself if the next branch has none.
        """
        norm_C, eps = next_norm_C if alpha is None else own_norm_C, self.config.rms_norm_eps
        if norm_C is None:
            add_branch(
                x_TC, branch.out_TC, branch.scale_C, None, branch.addend, branch_norm_C=branch.norm_C, eps=eps,
                counts_E=branch.counts_E,
            )  # fmt: skip
            return x_TC
        return add_norm(
            x_TC, branch.out_TC, norm_C, eps, branch_scale_C=branch.scale_C, branch_norm_C=branch.norm_C, alpha=alpha,
            addend=branch.addend, counts_E=branch.counts_E,
        )  # fmt: skip

    def _sum(self, out_TC: torch.Tensor, addend: Addend | None) -> tuple[torch.Tensor, Addend | None]:
        """The output of a branch and what is still to be added to it, after the sum over ranks."""
        return (out_TC, addend) if self.ranks is None else (self.ranks.all_reduce(out_TC, addend), None)

    def _project(
        self, x_TK: torch.Tensor, weight: PackedWeight, layer: int, source: str, adapters: Adapters | None
    ) -> tuple[torch.Tensor, Addend | None]:
        """The product of the linears that read `source`, and the addend for its reader."""
        if adapters is None:
            return self._apply(x_TK, weight), None
        projections = self.bank.projections.shared_inputs[source]
        adapters.begin(x_TK, layer, projections)
        out_TN = self._apply(x_TK, weight)
        return out_TN, adapters.end(out_TN, layer, projections, weight.bias_N)

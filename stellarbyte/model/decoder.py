"""The decoder and its language-model head as plain modules.

Serving runs these directly: importing transformers' model classes would delay the start by seconds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.attention import Attend, ByteMultiHeadSelfAttention, Project, plain_projection
from stellarbyte.model.building import add_parts
from stellarbyte.model.mlp import ByteMLP
from stellarbyte.model.moe.layer import ByteMoE
from stellarbyte.model.moe.losses import RouterLog, RouterSums
from stellarbyte.model.norm import ByteRMSNorm
from stellarbyte.model.residual import LayerScale, Residual
from stellarbyte.xpos import XPosRotaryEmbedding


class ByteDecoderLayer(nn.Module):
    """Attention and MLP (or a mixture of experts) around the residual stream, one after the other or in parallel."""

    input_layernorm: ByteRMSNorm | None
    attention_output_norm: ByteRMSNorm | None
    post_attention_layernorm: ByteRMSNorm | None
    mlp_output_norm: ByteRMSNorm | None
    attention_scale: LayerScale | None
    mlp_scale: LayerScale | None

    gradient_checkpointing = False  # set by transformers through `ByteTransformer._set_gradient_checkpointing`,
    recompute: Callable[..., Any]  # with the function that calls a layer and forgets what its backward pass needs

    def __init__(self, config: ByteModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = ByteMultiHeadSelfAttention(config, layer)
        self.mlp = ByteMLP(config, layer) if config.expert_layers[layer] is None else ByteMoE(config, layer)
        add_parts(self, "", config, layer)
        self.is_parallel = config.parallel_residual
        self.residual = Residual(config, layer)

    def forward(
        self,
        x: torch.Tensor,
        attend: Attend,
        project: Project,
        log: RouterLog | None = None,
        memory: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, RouterSums | None]:
        """x [..., hidden] → the same shape; leading dimensions are those that `attend` takes.

        `memory`: inputs of this layer for earlier tokens, [B, M, hidden], which attention reads as context. Also
        returns what the layer's router adds to the log, if there are both.
        """
        sums: RouterSums | None = None

        def attention(y: torch.Tensor) -> torch.Tensor:
            earlier = None if memory is None else self.residual.branch_input(memory, self.input_layernorm)
            y = self.self_attn(y, attend, project, earlier)
            y = y if self.attention_output_norm is None else self.attention_output_norm(y)
            return y if self.attention_scale is None else self.attention_scale(y)

        def mlp(y: torch.Tensor) -> torch.Tensor:
            nonlocal sums
            if isinstance(self.mlp, ByteMoE):
                y, sums = self.mlp(y, project, log)
            else:
                y = self.mlp(y, project)
            y = y if self.mlp_output_norm is None else self.mlp_output_norm(y)
            return y if self.mlp_scale is None else self.mlp_scale(y)

        if self.is_parallel:
            return self.residual(x, lambda y: attention(y) + mlp(y), self.input_layernorm), sums
        x = self.residual(x, attention, self.input_layernorm)
        return self.residual(x, mlp, self.post_attention_layernorm), sums


class ByteDecoder(nn.Module):
    """Embedding, layers and final norm. The same module trains on [B, T] and serves a flat row of tokens [T]."""

    def __init__(self, config: ByteModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embedding_multiplier = config.embedding_multiplier
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(ByteDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        mixtures = {number: layer.mlp for number, layer in enumerate(self.layers) if isinstance(layer.mlp, ByteMoE)}
        for number, mixture in mixtures.items():
            holder = config.expert_layers[number]
            if holder is not None and holder != number:
                mixture.use_experts_of(mixtures[holder])
        self.norm = ByteRMSNorm(config.hidden_size, config.rms_norm_eps, zero_centered=config.zero_centered_norms)
        self.rotary = XPosRotaryEmbedding(config)

    def forward(
        self,
        embeddings: torch.Tensor,
        attend: Attend,
        project: Project = plain_projection,
        *,
        log: RouterLog | None = None,
        memory: Sequence[torch.Tensor | None] | None = None,
        layer_inputs: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """[..., hidden] rows of `embed_tokens` → [..., hidden] after the final norm.

        Args:
            log: gets the sums of every router; None: not wanted.
            memory: for each layer its inputs for earlier tokens, [B, M, hidden]; None: there are none.
            layer_inputs: gets the input of every layer appended, [..., hidden]; None: not wanted.
        """
        if self.embedding_multiplier != 1:
            embeddings = embeddings * embeddings.new_tensor(self.embedding_multiplier)
        x = self.dropout(embeddings)
        for number, layer in enumerate(self.layers):
            if layer_inputs is not None:
                layer_inputs.append(x)
            earlier = None if memory is None else memory[number]
            if self.training and layer.gradient_checkpointing:
                recompute: Callable[..., Any] = layer.recompute  # type: ignore[assignment]  # of a bare Module
                x, sums = recompute(layer, x, attend, project, log, earlier)
            else:
                x, sums = layer(x, attend, project, log, earlier)
            if log is not None and sums is not None:
                log.layers.append(sums)
        return self.norm(x)


class ByteLanguageModel(nn.Module):
    """Decoder and head for inference, its parameters named as `ByteTransformer`'s."""

    def __init__(self, config: ByteModelConfig) -> None:
        super().__init__()
        self.model = ByteDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

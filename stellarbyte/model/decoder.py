"""The decoder and its language-model head as plain modules.

Serving runs these directly: importing transformers' model classes would delay the start by seconds.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.attention import Attend, ByteMultiHeadSelfAttention, Project, plain_projection
from stellarbyte.model.building import add_parts
from stellarbyte.model.mlp import ByteMLP
from stellarbyte.model.norm import ByteRMSNorm
from stellarbyte.model.residual import LayerScale, Residual
from stellarbyte.xpos import XPosRotaryEmbedding


class ByteDecoderLayer(nn.Module):
    """Attention and MLP around the residual stream, one after the other or in parallel."""

    input_layernorm: ByteRMSNorm
    post_attention_layernorm: ByteRMSNorm | None
    attention_scale: LayerScale | None
    mlp_scale: LayerScale | None

    gradient_checkpointing = False  # transformers' `gradient_checkpointing_enable` sets it on every module that has it

    def __init__(self, config: ByteModelConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = ByteMultiHeadSelfAttention(config, layer)
        self.mlp = ByteMLP(config, layer)
        add_parts(self, "", config, layer)
        self.residual = Residual(config, layer)

    def forward(
        self, x: torch.Tensor, attend: Attend, project: Project, memory: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [..., hidden] → the same shape; leading dimensions are those that `attend` takes.

        `memory`: inputs of this layer for earlier tokens, [B, M, hidden], which attention reads as context.
        """

        def attention(y: torch.Tensor) -> torch.Tensor:
            earlier = None if memory is None else self.residual.branch_input(memory, self.input_layernorm)
            y = self.self_attn(y, attend, project, earlier)
            return y if self.attention_scale is None else self.attention_scale(y)

        def mlp(y: torch.Tensor) -> torch.Tensor:
            y = self.mlp(y, project)
            return y if self.mlp_scale is None else self.mlp_scale(y)

        if self.post_attention_layernorm is None:
            return self.residual(x, lambda y: attention(y) + mlp(y), self.input_layernorm)
        x = self.residual(x, attention, self.input_layernorm)
        return self.residual(x, mlp, self.post_attention_layernorm)


class ByteDecoder(nn.Module):
    """Embedding, layers and final norm. The same module trains on [B, T] and serves a flat row of tokens [T]."""

    def __init__(self, config: ByteModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(ByteDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = ByteRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary = XPosRotaryEmbedding(config)

    def forward(
        self,
        embeddings: torch.Tensor,
        attend: Attend,
        project: Project = plain_projection,
        *,
        memory: Sequence[torch.Tensor | None] | None = None,
        layer_inputs: list[torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """[..., hidden] token embeddings → [..., hidden] after the final norm.

        Args:
            memory: for each layer its inputs for earlier tokens, [B, M, hidden]; None: there are none.
            layer_inputs: gets the input of every layer appended, [..., hidden]; None: not wanted.
        """
        x = self.dropout(embeddings)
        for number, layer in enumerate(self.layers):
            if layer_inputs is not None:
                layer_inputs.append(x)
            earlier = None if memory is None else memory[number]
            if self.training and layer.gradient_checkpointing:
                x = checkpoint(layer, x, attend, project, earlier, use_reentrant=False)
            else:
                x = layer(x, attend, project, earlier)
        return self.norm(x)


class ByteLanguageModel(nn.Module):
    """Decoder and head for inference, its parameters named as `ByteTransformer`'s."""

    def __init__(self, config: ByteModelConfig) -> None:
        super().__init__()
        self.model = ByteDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

"""A ByteTransformer on the CPU kernels: packs the weights once, then runs serving steps. Knows no requests."""

from array import array
from collections.abc import Callable
from typing import cast

import numpy as np
import torch

from stellarbyte.backends.torch_model import ServedModel
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.config import ByteModelConfig
from stellarbyte.forward_batch import ForwardBatch
from stellarbyte.lora.bank import LoraBank
from stellarbyte.model.decoder import ByteDecoder, ByteDecoderLayer, ByteLanguageModel
from stellarbyte.model.residual import deepnorm_alpha
from stellarbyte.ops.cpu import one_compiles
from stellarbyte.ops.cpu.adjustment import adjust_logits
from stellarbyte.ops.cpu.attention import BatchArrays, Floats, Rotations
from stellarbyte.ops.cpu.instructions import LANES
from stellarbyte.ops.cpu.layers import LayerOptions, LayerWeights, forward_layers, rms_norm
from stellarbyte.ops.cpu.linear import ACTIVATIONS, NO_ACTIVATION, PANEL_ROWS, linear
from stellarbyte.ops.cpu.lora import Adapters, adapters_of, no_adapters
from stellarbyte.ops.cpu.packing import PackedWeight, interleave_gated, pack
from stellarbyte.ops.cpu.sampler import sample
from stellarbyte.sampling.adjustment import LogitAdjustment, RowAdjustment
from stellarbyte.sampling.sampler import GREEDY, RowSampling

# T tokens, R rows that sample, C hidden size, V vocabulary, O offsets, D head dim


def fits(config: ByteModelConfig) -> bool:
    """Whether the kernels can run a model: they take a head in whole vectors."""
    return config.head_dim is not None and config.head_dim % LANES == 0


class CpuModel(ServedModel):
    """The weights of a `ByteLanguageModel`, packed. Engine thread only.

    Args:
        config: the one to serve with; its windows and sinks may differ from the model's own.
        bank: the adapters, float32; None: there are none.
        quantization: "none", "int8" or "int4": of all matrices but the embedding.
        num_threads: numba threads to use.

    Raises:
        ValueError: the quantization does not fit the model's shape.
    """

    def __init__(
        self,
        model: ByteLanguageModel,
        config: ByteModelConfig,
        bank: LoraBank | None = None,
        *,
        quantization: str,
        num_threads: int,
    ) -> None:
        decoder = model.model
        self.bank = LoraBank(config) if bank is None else bank
        self.num_threads = num_threads
        self.vocab_size = config.vocab_size
        self.embedding_VC = _numpy(decoder.embed_tokens.weight)
        self.final_norm_C = _numpy(decoder.norm.weight)
        # The head's errors reach every token's logit directly: in four bits it would cost more quality than it saves.
        self.head_weight = pack(_numpy(model.lm_head.weight), "int8" if quantization == "int4" else quantization)
        self.layers = _stack_layers(decoder, config, quantization)
        self.options = LayerOptions(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or 0,
            head_dim=config.head_dim or 0,
            intermediate_size=config.intermediate_size,
            activation=ACTIVATIONS[config.hidden_act],
            sink_tokens=config.sink_tokens,
            score_scale=decoder.rotary.score_scale,
            norm_eps=config.rms_norm_eps,
            alpha=deepnorm_alpha(config) if config.deepnorm else 0.0,
        )
        self._rotary = decoder.rotary
        self._rotations: Rotations | None = None

    def hidden(self, batch: ForwardBatch, cache: PagedKVCache) -> torch.Tensor:
        hidden_TC = self._run(
            self.embedding_VC[batch.token_ids_T.numpy()],
            batch_arrays(batch),
            adapters_of(batch, self.bank),
            self.rotations_up_to(batch.reach + cache.block_size),
            cache.keys_LBSKD.numpy(),
            cache.values_LBSKD.numpy(),
        )
        return torch.from_numpy(hidden_TC)

    def head(self, hidden_RC: torch.Tensor) -> torch.Tensor:
        logits_RV = np.empty((len(hidden_RC), self.vocab_size), np.float32)
        if len(logits_RV):
            head = tuple(self.head_weight)
            linear(hidden_RC.numpy(), head, _NO_BIAS, _NO_ADDEND, logits_RV, NO_ACTIVATION, self.num_threads)
        return torch.from_numpy(logits_RV)

    def adjust(self, logits_RV: torch.Tensor, rows: list[RowAdjustment | None]) -> None:
        adjust_logits(logits_RV, rows)

    def sample(self, logits_RV: torch.Tensor, rows: list[RowSampling]) -> list[int]:
        return sample(logits_RV, rows, self.num_threads)

    def _run(
        self,
        x_TC: Floats,
        batch: BatchArrays,
        adapters: Adapters,
        rotations: Rotations,
        keys: Floats,
        values: Floats,
    ) -> Floats:
        forward_layers(x_TC, self.layers, self.options, batch, adapters, rotations, keys, values, self.num_threads)
        hidden_TC = np.empty_like(x_TC)
        rms_norm(x_TC, self.final_norm_C, np.float32(self.options.norm_eps), hidden_TC, self.num_threads)
        return hidden_TC

    def warm_up(self) -> None:
        """Compile the kernels, or load them from the user's cache, by running a token against a cache of its own."""
        options = self.options
        shape = (len(self.layers.windows_L), 1, 1, options.num_kv_heads, options.head_dim)
        zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
        arrays = BatchArrays(zero, zero, zero, zero, zero[None], zero[None], one, zero)
        adapters = no_adapters(self.bank)
        keys, values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        rotations = self.rotations_up_to(1)
        with one_compiles():
            hidden_TC = self._run(self.embedding_VC[:1].copy(), arrays, adapters, rotations, keys, values)
            logits_RV = self.head(torch.from_numpy(hidden_TC))
            self.adjust(logits_RV, [LogitAdjustment(self.vocab_size, torch.device("cpu")).before(array("I"))])
            self.sample(logits_RV, [GREEDY])

    def rotations_up_to(self, offset: int) -> Rotations:
        if self._rotations is None or len(self._rotations.cos_OD) <= offset:
            cos, sin = self._rotary.cache.tables(offset + 1, torch.device("cpu"))
            log_decay = self._rotary.log_decay(torch.device("cpu"))
            decay = torch.ones_like(cos)
            if log_decay is not None:
                decay = torch.exp(torch.arange(len(cos))[:, None] * log_decay.detach())
            self._rotations = Rotations(cos.numpy(), sin.numpy(), decay.numpy())
        return self._rotations


_NO_BIAS = np.zeros(0, np.float32)
_NO_ADDEND = np.zeros((0, 0), np.float32)


def _numpy(tensor: torch.Tensor) -> Floats:
    return tensor.detach().float().contiguous().numpy()


def batch_arrays(batch: ForwardBatch) -> BatchArrays:
    starts = np.array(batch.query_starts, dtype=np.int64)
    return BatchArrays(
        positions_T=batch.positions_T.numpy(),
        slots_T=batch.slots_T.numpy(),
        offsets_T=batch.offsets_T.numpy(),
        sequences_T=np.repeat(np.arange(len(starts) - 1), np.diff(starts)),
        block_tables_NM=batch.block_tables_NM.numpy(),
        block_bases_NM=batch.block_bases_NM.numpy(),
        num_blocks_N=np.array(batch.num_blocks, dtype=np.int64),
        num_sink_blocks_N=np.array(batch.num_sink_blocks, dtype=np.int64),
    )


def _stack_layers(decoder: ByteDecoder, config: ByteModelConfig, quantization: str) -> LayerWeights:
    layers = cast(list[ByteDecoderLayer], list(decoder.layers))

    def weight(matrix: Callable[[ByteDecoderLayer], Floats]) -> PackedWeight:
        return _stack_packed([pack(matrix(layer), quantization) for layer in layers])

    def vector(parameter: Callable[[ByteDecoderLayer], torch.Tensor | None]) -> Floats:
        found = [parameter(layer) for layer in layers]
        return np.stack([_NO_BIAS if value is None else _numpy(value) for value in found])

    def bias(parts: Callable[[ByteDecoderLayer], list[torch.nn.Linear]]) -> Floats:
        if parts(layers[0])[0].bias is None:
            return np.zeros((len(layers), 0), np.float32)
        return np.stack([_whole_panels(np.concatenate([_numpy(p.bias) for p in parts(layer)])) for layer in layers])

    def qkv(layer: ByteDecoderLayer) -> list[torch.nn.Linear]:
        return [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]

    def gate_up_bias(layer: ByteDecoderLayer) -> torch.Tensor | None:
        gate, up = layer.mlp.gate_proj.bias, layer.mlp.up_proj.bias
        return None if gate is None else torch.from_numpy(interleave_gated(_numpy(gate), _numpy(up)))

    return LayerWeights(
        qkv=weight(lambda layer: np.concatenate([_numpy(linear.weight) for linear in qkv(layer)])),
        output=weight(lambda layer: _numpy(layer.self_attn.o_proj.weight)),
        gate_up=weight(
            lambda layer: interleave_gated(_numpy(layer.mlp.gate_proj.weight), _numpy(layer.mlp.up_proj.weight))
        ),
        down=weight(lambda layer: _numpy(layer.mlp.down_proj.weight)),
        qkv_bias=bias(qkv),
        output_bias=bias(lambda layer: [layer.self_attn.o_proj]),
        gate_up_bias=vector(gate_up_bias),
        down_bias=bias(lambda layer: [layer.mlp.down_proj]),
        input_norm_LC=vector(lambda layer: layer.input_layernorm.weight),
        mlp_norm_LC=vector(lambda layer: getattr(layer.post_attention_layernorm, "weight", None)),
        q_norm_LD=vector(lambda layer: getattr(layer.self_attn.q_norm, "weight", None)),
        k_norm_LD=vector(lambda layer: getattr(layer.self_attn.k_norm, "weight", None)),
        attention_scale_LC=vector(lambda layer: getattr(layer.attention_scale, "weight", None)),
        mlp_scale_LC=vector(lambda layer: getattr(layer.mlp_scale, "weight", None)),
        windows_L=np.array([window or 0 for window in config.windows], dtype=np.int64),
    )


def _stack_packed(packed: list[PackedWeight]) -> PackedWeight:
    return PackedWeight(*(np.stack(parts) for parts in zip(*packed, strict=True)))


def _whole_panels(bias: Floats) -> Floats:
    return np.pad(bias, (0, -len(bias) % PANEL_ROWS))

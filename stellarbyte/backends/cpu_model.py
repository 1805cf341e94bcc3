"""A ByteTransformer on the CPU kernels: packs the weights once, then runs serving steps."""

import copy
from array import array
from collections.abc import Mapping
from types import MappingProxyType
from typing import Self

import numba
import numpy as np
import torch

from stellarbyte.backends.cpu_matrices import CpuMatrices, numpy_float32
from stellarbyte.backends.cpu_weights import (
    EXPERT_PARTS,
    GATED_INPUTS,
    INPUTS,
    SHARED_INPUTS,
    VECTORS,
    stack_layers,
    windows,
)
from stellarbyte.backends.replaced import RowAdapters, add_embeddings, add_logits
from stellarbyte.backends.torch_model import ServedModel
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.checkpoint.quantized.matrix import QuantizedMatrix
from stellarbyte.config import ByteModelConfig
from stellarbyte.forward_batch import ForwardBatch
from stellarbyte.lora.bank import EMBEDDING, HEAD, LoraBank
from stellarbyte.model.decoder import ByteLanguageModel
from stellarbyte.model.logits import finish_logits
from stellarbyte.model.parts import Part, model_parts
from stellarbyte.model.residual import deepnorm_alpha
from stellarbyte.ops.cpu import one_compiles
from stellarbyte.ops.cpu.adjustment import adjust_logits
from stellarbyte.ops.cpu.attention import BatchArrays, Floats, Rotations
from stellarbyte.ops.cpu.instructions import LANES
from stellarbyte.ops.cpu.layers import LayerOptions, LayerWeights, forward_layers, rms_norm
from stellarbyte.ops.cpu.linear import ACTIVATIONS, INVARIANT, NO_ACTIVATION, PLAIN, TILED, linear
from stellarbyte.ops.cpu.lora import Adapters, adapters_of, no_adapters
from stellarbyte.ops.cpu.packing import PackedWeight, StackedLinears, interleaved_rows, panels_of, unpack
from stellarbyte.ops.cpu.panels.tiles import may_use_tiles
from stellarbyte.ops.cpu.sampler import sample
from stellarbyte.sampling.adjustment import LogitAdjustment, RowAdjustment
from stellarbyte.sampling.sampler import GREEDY, RowSampling

# T tokens, R rows that sample, C hidden size, V vocabulary, O offsets, D head dim


def fits(config: ByteModelConfig) -> bool:
    """Whether the kernels support a model: heads are whole vectors, tokens choose equally many experts, whose SwiGLU is
    not clamped, and there is a place for every part."""
    has_whole_heads = config.head_dim is not None and config.head_dim % LANES == 0
    has_plain_experts = config.router_top_p is None and config.swiglu_limit is None
    return has_whole_heads and has_plain_experts and all(_has_place(part, config) for part in model_parts(config))


def _has_place(part: Part, config: ByteModelConfig) -> bool:
    """Whether the kernels take a part. Norms and scales must be in all layers, linears and experts in some."""
    layers = range(config.num_hidden_layers)
    if len({part.shape(config, layer) for layer in layers}) > 1:
        return False
    if part.reads in INPUTS | SHARED_INPUTS or part.name in EXPERT_PARTS:
        return True
    return part.name in VECTORS and all(part.exists(config, layer) for layer in layers)


class CpuModel(ServedModel):
    """The weights of a `ByteLanguageModel`, packed. Engine thread only.

    Args:
        config: for serving; its windows and sinks may differ from the model's own.
        bank: the adapters, float32; None: no adapters.
        quantization: "none", "int8" or "int4": of all matrices but the embedding and routers.
        num_threads: numba threads to use.
        is_invariant: the numbers of a sequence do not depend on the rest of a step, bit for bit; see `ops.cpu.linear`.
            Without it, the matrix unit of an x86 processor computes the products of many tokens.
        kept: the quantized matrices of a checkpoint, by the names of their parameters, as in `CpuMatrices`.

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
        is_invariant: bool = False,
        kept: Mapping[str, QuantizedMatrix] = MappingProxyType({}),
    ) -> None:
        decoder = model.model
        matrices = CpuMatrices(model, config, kept, quantization)
        self.quantization = matrices.quantization
        self.bank = LoraBank(config) if bank is None else bank
        # Starts the kernels' threads. Stored code does so when it is loaded, but not that of a kernel whose parts were
        # loaded when it was compiled, as after a first start that was interrupted: it would jump to address 0.
        numba.get_num_threads()
        self.num_threads = num_threads
        self.vocab_size = config.vocab_size
        self.embedding_VC = numpy_float32(decoder.embed_tokens.weight)
        self.embedding_multiplier = config.embedding_multiplier
        self.final_norm_C = numpy_float32(decoder.norm.gain)
        self.head_weight = panels_of(matrices.head())
        self.logits_multiplier, self.logits_softcap = config.logits_multiplier, config.logits_softcap
        self.layers = stack_layers(model, config, matrices, self.bank.projections)
        self.options = LayerOptions(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads or 0,
            head_dim=config.head_dim or 0,
            intermediate_size=config.intermediate_size,
            activation=ACTIVATIONS[config.hidden_act],
            sink_tokens=config.sink_tokens,
            softcap=float(config.attention_softcap or 0.0),
            norm_eps=config.rms_norm_eps,
            alpha=deepnorm_alpha(config) if config.deepnorm else 0.0,
            is_parallel=config.parallel_residual,
            arithmetic=INVARIANT if is_invariant else TILED if may_use_tiles() else PLAIN,
        )
        self._places = {name: (layer, number) for layer, number, name in self.bank.projections.modules()}
        self._rotary = decoder.rotary
        self._context_length = config.context_length
        self._rotations: Rotations | None = None

    def hidden(self, batch: ForwardBatch, cache: PagedKVCache) -> torch.Tensor:
        x_TC = add_embeddings(torch.from_numpy(self.embedding_VC[batch.token_ids_T.numpy()]), batch, self.bank)
        if self.embedding_multiplier != 1:
            x_TC *= self.embedding_multiplier
        hidden_TC = self._run(
            x_TC.numpy(),
            batch_arrays(batch),
            adapters_of(batch, self.bank),
            self.rotations_up_to(batch.reach + cache.block_size),
            cache.keys_LBSKD.numpy(),
            cache.values_LBSKD.numpy(),
        )
        return torch.from_numpy(hidden_TC)

    def head(self, hidden_RC: torch.Tensor, adapters: RowAdapters = ()) -> torch.Tensor:
        logits_RV = np.empty((len(hidden_RC), self.vocab_size), np.float32)
        if len(logits_RV):
            head = tuple(self.head_weight)
            linear(
                hidden_RC.numpy(), head, _NO_BIAS, _NO_ADDEND, logits_RV, NO_ACTIVATION, self.options.arithmetic,
                self.num_threads,
            )  # fmt: skip
        products_RV = add_logits(torch.from_numpy(logits_RV), hidden_RC, adapters, self.bank)
        return finish_logits(products_RV, self.logits_multiplier, self.logits_softcap)

    def adjust(self, logits_RV: torch.Tensor, rows: list[RowAdjustment | None]) -> None:
        adjust_logits(logits_RV, rows)

    def sample(self, logits_RV: torch.Tensor, rows: list[RowSampling]) -> list[int]:
        return sample(logits_RV, rows, self.num_threads)

    def weight(self, module: str) -> torch.Tensor:
        if module == EMBEDDING:
            return torch.from_numpy(self.embedding_VC)
        if module == HEAD:
            return torch.from_numpy(unpack(self.head_weight)[: self.vocab_size])
        layer, number = self._places[module]
        groups = self.bank.projections.shared_inputs.items()
        shared = next(name for name, group in groups if group.start <= number < group.stop)
        linears: StackedLinears = (
            getattr(self.layers, INPUTS[shared])
            if shared in INPUTS
            else getattr(self.layers.experts, SHARED_INPUTS[shared])
        )
        place = linears.places_L[layer]
        packed = PackedWeight(linears.weights[place], linears.scales[place], linears.minima[place])
        widths, i = linears.widths, number - linears.first
        first = int(widths[:i].sum())
        is_gated = shared in GATED_INPUTS
        rows = interleaved_rows(int(widths[i]), i) if is_gated else np.arange(first, first + int(widths[i]))
        return torch.from_numpy(unpack(packed)[rows])

    def with_windows_of(self, config: ByteModelConfig) -> Self:
        other = copy.copy(self)
        other.layers = self.layers._replace(windows_L=windows(config))
        other.options = self.options._replace(sink_tokens=config.sink_tokens)
        other._context_length, other._rotations = config.context_length, None
        return other

    def _run(
        self,
        x_TC: Floats,
        batch: BatchArrays,
        adapters: Adapters,
        rotations: Rotations,
        keys: Floats,
        values: Floats,
    ) -> Floats:
        forward_layers(
            x_TC, self.layers, self.layers.experts, self.options, batch, adapters, rotations, keys, values,
            self.num_threads,
        )  # fmt: skip
        hidden_TC = np.empty_like(x_TC)
        rms_norm(x_TC, self.final_norm_C, np.float32(self.options.norm_eps), hidden_TC, self.num_threads)
        return hidden_TC

    def warm_up(self) -> None:
        """Compile the kernels, or load them from the user's cache, by running one token on a temporary cache."""
        options = self.options
        shape = (len(self.layers.windows_L), 1, 1, options.num_kv_heads, options.head_dim)
        zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
        arrays = BatchArrays(zero, zero, zero, zero, np.arange(2), zero[None], zero[None], one, zero)
        adapters = no_adapters(self.bank)
        keys, values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        rotations = self.rotations_up_to(1)
        with one_compiles():
            hidden_TC = self._run(self.embedding_VC[:1].copy(), arrays, adapters, rotations, keys, values)
            logits_RV = self.head(torch.from_numpy(hidden_TC))
            self.adjust(logits_RV, [LogitAdjustment(self.vocab_size, torch.device("cpu")).before(array("I"))])
            self.sample(logits_RV, [GREEDY])

    def rotations_up_to(self, offset: int) -> Rotations:
        """The tables of all rotations for offsets up to `offset`."""
        if self._rotations is None or self._rotations.cos_OD.shape[1] <= offset:
            kinds = [self._rotary.of_layer(layer, self._context_length) for layer in _first_layers(self.layers)]
            cpu = torch.device("cpu")
            tables = [kind.cache.tables(offset + 1, cpu) for kind in kinds]
            rows = min(len(cos) for cos, _ in tables)
            decays = [torch.ones(rows, self.options.head_dim // 2) for _ in kinds]
            for kind, decay in zip(kinds, decays, strict=True):
                if (log_decay := kind.log_decay(cpu)) is not None:
                    torch.exp(torch.arange(rows)[:, None] * log_decay.detach(), out=decay)
            cos, sin = (torch.stack([table[:rows] for table in group]) for group in zip(*tables, strict=True))
            one = torch.ones(self.options.head_dim // 2)
            gains = [one if kind.query_gain is None else kind.query_gain for kind in kinds]
            has_gain = any(kind.query_gain is not None for kind in kinds)
            gain = torch.stack(gains if has_gain else [one[:0]] * len(kinds))
            self._rotations = Rotations(cos.numpy(), sin.numpy(), torch.stack(decays).numpy(), gain.numpy())
        return self._rotations


_NO_BIAS = np.zeros(0, np.float32)
_NO_ADDEND = np.zeros((0, 0), np.float32)


def batch_arrays(batch: ForwardBatch) -> BatchArrays:
    starts = np.array(batch.query_starts, dtype=np.int64)
    return BatchArrays(
        positions_T=batch.positions_T.numpy(),
        slots_T=batch.slots_T.numpy(),
        offsets_T=batch.offsets_T.numpy(),
        sequences_T=np.repeat(np.arange(len(starts) - 1), np.diff(starts)),
        starts_N=starts,
        block_tables_NM=batch.block_tables_NM.numpy(),
        block_bases_NM=batch.block_bases_NM.numpy(),
        num_blocks_N=np.array(batch.num_blocks, dtype=np.int64),
        num_sink_blocks_N=np.array(batch.num_sink_blocks, dtype=np.int64),
    )


def _first_layers(layers: LayerWeights) -> list[int]:
    """The first layer of each rotation."""
    kinds = layers.rotations_L.tolist()
    return [kinds.index(kind) for kind in range(max(kinds) + 1)]

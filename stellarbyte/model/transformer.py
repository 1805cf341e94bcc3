"""ByteTransformer: the decoder and its head as a transformers model, for training and `generate`. Serving uses
`decoder.py`."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast

from stellarbyte.cache.memory import Memory
from stellarbyte.cache.relative import RelativeCache, RelativeCacheLayer
from stellarbyte.config import ByteModelConfig
from stellarbyte.model.attention import ByteMultiHeadSelfAttention
from stellarbyte.model.auto import register_model_if_wanted
from stellarbyte.model.decoder import ByteDecoder, ByteDecoderLayer
from stellarbyte.model.dense_attention import DenseAttention
from stellarbyte.model.logits import finish_logits
from stellarbyte.model.loss import NO_LABEL, next_tokens, summed_loss, summed_loss_of_hidden
from stellarbyte.model.moe.experts import ByteExperts
from stellarbyte.model.moe.layer import ByteMoE
from stellarbyte.model.moe.losses import RouterLog, RouterLosses, router_losses
from stellarbyte.model.moe.router import ByteRouter, move_selection_bias
from stellarbyte.model.norm import ByteRMSNorm
from stellarbyte.model.positions import positions_of
from stellarbyte.model.residual import LayerScale
from stellarbyte.xpos import XPosRotaryEmbedding

# The name transformers gives the cache in outputs and in `generate`: it was "past_key_values" before 5.24.
CACHE = (
    "cache" if any(field.name == "cache" for field in dataclasses.fields(CausalLMOutputWithPast)) else "past_key_values"
)

# B sequences, T tokens, V vocabulary, L layers, K key/value heads, S past tokens, D head dim, E experts


@dataclass
class ByteOutput(CausalLMOutputWithPast):
    """transformers' output, and what the routers of a mixture of experts report in training or with labels: the fields
    of `RouterLosses`, each without its coefficient. In evaluation and of dense models they are not part of the loss.
    """

    balance_loss: torch.Tensor | None = None
    z_loss: torch.Tensor | None = None
    router_entropy: torch.Tensor | None = None
    load_kl: torch.Tensor | None = None
    expert_load: torch.Tensor | None = None


class ByteTransformer(PreTrainedModel, GenerationMixin):
    """A causal language model; its config switches parts on and off, which makes it Llama and many of its relatives."""

    config_class = ByteModelConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["ByteDecoderLayer"]
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}
    _supports_sdpa = True
    _supports_flex_attn = True
    accepts_loss_kwargs = True  # tells transformers' Trainer that forward takes num_items_in_batch

    def __init__(self, config: ByteModelConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # tells transformers' Trainer which labels count
        self.model = ByteDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: RelativeCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        cache: RelativeCache | None = None,
        memory: Memory | None = None,
        document_ids: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        smoothing: float = 0.0,
        skip_logits: bool = False,
        return_dict: bool | None = True,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> ByteOutput:
        """Logits of whole sequences, or of their continuation after a cache or a memory.

        Unknown arguments are errors; there is no **kwargs that would ignore them.

        Args:
            input_ids: [B, T]; or `inputs_embeds` [B, T, hidden].
            attention_mask: [B, past + T], 0 for padding on either side.
            position_ids: [B, T], counted from the end of the memory; default: counted from the attention mask. With
                document_ids, from a number of the row's own at the start of each document.
            labels: [B, T]; the loss is the mean over positions whose next label is not -100 and in the same document.
                In training, the auxiliary losses of routers are added with their coefficients.
            past_key_values, cache: the cache that the previous call returned; two names of one argument (newer
                releases of transformers use `cache`).
            memory: of the B sequences' earlier segments; read as context, then extended by these T tokens. A cache that
                has begun with it goes on with it.
            document_ids: [B, T], the number of each token's document where rows hold several, one after the other; less
                than 0: padding. A document is a run of one number: it sees no other, and its positions start at 0.
            use_cache: return a cache for the next call; default: `config.use_cache` outside training and without
                documents.
            logits_to_keep: number of last tokens that get logits; 0: all tokens.
            num_items_in_batch: divisor of the summed loss (gradient accumulation); default: the number of labels here.
            smoothing: of labels, ε of `stellarbyte.model.loss.summed_loss`, at least 0 and less than 1. (Trainers take
                every argument with "label" in its name for labels.)
            skip_logits: return no logits; the loss then never needs those of all tokens in memory.
            return_dict, output_attentions, output_hidden_states: passed by PEFT; only their defaults are supported.

        Returns:
            logits [B, T, V] in the model's dtype or None, loss or None, the cache or None (as `past_key_values`, and as
            `cache` where transformers knows that name); the fields of `ByteOutput` for mixtures of experts.
        """
        _refuse_arguments(input_ids, inputs_embeds, past_key_values, cache, return_dict)
        if output_attentions or output_hidden_states:
            raise ValueError("output_attentions and output_hidden_states are not supported")
        embeddings = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if memory is None and isinstance(cache, RelativeCache):
            memory = cache.memory
        cache = self._cache(cache, use_cache, memory, is_packed=document_ids is not None)
        wants_log = self.config.num_experts > 0 and (self.training or labels is not None)
        hidden, log = self._hidden(embeddings, attention_mask, position_ids, document_ids, cache, memory, wants_log)
        logits = None if skip_logits else self._logits(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        losses = None if log is None else router_losses(log.layers)
        loss = None
        if labels is not None:
            targets = next_tokens(labels, document_ids)
            loss = self._loss(hidden, logits, targets, smoothing, num_items_in_batch, losses)
        return ByteOutput(loss=loss, logits=logits, **{CACHE: cache}, **({} if losses is None else losses._asdict()))

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return finish_logits(self.lm_head(hidden), self.config.logits_multiplier, self.config.logits_softcap)

    def _loss(
        self,
        hidden: torch.Tensor,
        logits: torch.Tensor | None,
        targets: torch.Tensor,
        smoothing: float,
        num_items_in_batch: int | torch.Tensor | None,
        losses: RouterLosses | None,
    ) -> torch.Tensor:
        """Of the logits if they are there for all tokens, and otherwise without them; in training with `losses`."""
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing ({smoothing}) must be at least 0 and less than 1")
        if logits is not None and logits.shape[1] == hidden.shape[1]:
            total = summed_loss(logits.flatten(0, 1), targets.flatten(), smoothing)
        else:
            total = summed_loss_of_hidden(
                hidden.flatten(0, 1), targets.flatten(), self._logits, self.config.vocab_size, smoothing
            )
        num_targets = (targets != NO_LABEL).sum()
        loss = total / (num_targets if num_items_in_batch is None else num_items_in_batch)
        if losses is not None and self.training:  # as a share of all batches that are accumulated: they count once
            share = 1.0 if num_items_in_batch is None else num_targets / num_items_in_batch
            loss = loss + share * losses.weighted(self.config).to(loss.device)
        return loss

    def set_training_step(self, step: int) -> None:
        """Tell the routers the number of this training step, for `router_top_p_steps`. Loading starts at 0."""
        for router in self._routers():
            router.step = step

    def balance_experts(self, expert_load: torch.Tensor, rate: float) -> None:
        """After a training step, move the biases of `router_selection_bias` by `rate` towards an even load.

        Args:
            expert_load: [layers with experts, E] as the outputs have it; its sum over accumulated batches.

        Raises:
            ValueError: the model has no such biases.
        """
        if not self.config.router_selection_bias:
            raise ValueError("balance_experts needs router_selection_bias")
        for router, load_E in zip(self._routers(), expert_load, strict=True):
            assert router.e_score_correction_bias is not None  # as the config says
            move_selection_bias(router.e_score_correction_bias, load_E, rate)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = partial(checkpoint, use_reentrant=False),  # noqa: B008
        every_n_layers: int = 1,
    ) -> None:
        """transformers' hook: recompute layers 0, n, 2n, ... in the backward pass, through the given function.

        Raises:
            ValueError: every_n_layers is less than 1, or the function is the reentrant one.
        """
        if every_n_layers < 1:
            raise ValueError(f"every_n_layers ({every_n_layers}) must be at least 1")
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError("use_reentrant must be False: layers take and return more than tensors")
        layers: list[ByteDecoderLayer] = list(self.model.layers)  # type: ignore[arg-type]
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = enable and number % every_n_layers == 0
            layer.recompute = gradient_checkpointing_func

    def _routers(self) -> list[ByteRouter]:
        return [layer.mlp.gate for layer in self.model.layers if isinstance(layer.mlp, ByteMoE)]

    def _hidden(
        self,
        embeddings: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        document_ids: torch.Tensor | None,
        cache: RelativeCache | None,
        memory: Memory | None,
        wants_log: bool,
    ) -> tuple[torch.Tensor, RouterLog | None]:
        """[B, T, hidden] after the final norm, and the routers' log if it is wanted; extends the memory."""
        if memory is not None and memory.batch_size not in (None, len(embeddings)):
            raise ValueError(f"the memory holds {memory.batch_size} sequences, but the input has {len(embeddings)}")
        is_first = cache is None or cache.get_seq_length() == 0
        read = memory if is_first else None  # later, the cache has its keys
        places = positions_of(
            embeddings,
            attention_mask,
            position_ids,
            document_ids,
            cache=cache,
            memory=read,
            context=self.config.max_position_embeddings,
        )
        attend = DenseAttention(
            self.config,
            self.model.rotary,
            places,
            cache=cache,
            memory=read,
            implementation=self.config._attn_implementation or "sdpa",
            dropout=self.config.attention_dropout if self.training else 0.0,
        )
        log = RouterLog(places.is_token_BT) if wants_log else None
        if memory is None:
            return self.model(embeddings, attend, log=log), log
        layers = range(self.config.num_hidden_layers)
        rows = None if read is None else [_like(embeddings, read.get(layer)) for layer in layers]
        layer_inputs: list[torch.Tensor] = []
        hidden = self.model(embeddings, attend, log=log, memory=rows, layer_inputs=layer_inputs)
        memory.update_all(layer_inputs)
        return hidden, log

    def _cache(
        self, given: RelativeCache | None, use_cache: bool | None, memory: Memory | None, *, is_packed: bool
    ) -> RelativeCache | None:
        if self.training and any(layer.gradient_checkpointing for layer in self.model.layers):
            return None  # a layer runs twice there and would extend the cache twice
        if isinstance(given, RelativeCache):
            given.attach(memory)
            return given
        if given is not None and given.get_seq_length() > 0:
            raise ValueError(f"the cache must be a RelativeCache, got {type(given).__name__}")
        wanted = self.config.use_cache and not self.training and not is_packed if use_cache is None else use_cache
        if not wanted:
            return None
        cache = RelativeCache(self.config)
        cache.attach(memory)
        return cache

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any) -> None:
        """Start `generate` with a RelativeCache: transformers' default cache keeps absolute rotations and drops
        sinks."""
        if generation_config.cache_implementation is not None:
            raise ValueError("cache_implementation is not supported; a ByteTransformer always uses RelativeCache")
        if generation_config.use_cache and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = RelativeCache(self.config)
        if model_kwargs.get("memory") is not None or getattr(model_kwargs.get(CACHE), "memory", None) is not None:
            _refuse_with_memory(generation_config)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The arguments of `generate`'s next forward: the whole sequence where longrope's factors change, as in
        transformers, since the keys that upper layers hold come from the factors before."""
        cache, mask = kwargs.get(CACHE), kwargs.get("attention_mask")
        if isinstance(cache, RelativeCache) and cache.get_seq_length():
            length = input_ids.shape[1] if mask is None else int(mask.sum(dim=-1).max())
            if self.model.rotary.changes_with(length - input_ids.shape[1] + cache.get_seq_length(), length):
                cache.reset()
                next_sequence_length = None
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(input_ids, next_sequence_length, **kwargs)
        return prepared

    @torch.no_grad()
    def forward_step(
        self, x_t: torch.Tensor, past_k: torch.Tensor | None = None, past_v: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decode one token with the keys and values held by the caller.

        Args:
            x_t: [B, 1] token ids.
            past_k, past_v: [L, B, K, S, D] as returned by the previous step; None at the start. Keys are not rotated.

        Returns:
            (logits [B, 1, V], new_k, new_v) with S + 1 tokens, or, once every layer has a window, with the sinks and
            the last window - 1 tokens. Scores depend on distances only and the sinks' distance is capped by the
            window, so the dropped tokens change no later result, and a token's index here serves as its position.
        """
        if (past_k is None) != (past_v is None):
            raise ValueError("give both past_k and past_v, or neither")
        cache = RelativeCache(self.config, alike=True)
        if past_k is not None and past_v is not None:
            for layer, k, v in zip(cache.layers, past_k, past_v, strict=True):
                layer.update(k, v)
        logits = self(x_t, past_key_values=cache).logits
        layers: list[RelativeCacheLayer] = cache.layers
        index = layers[0].visible_later()
        for layer in layers:
            layer.keep(index)
        keys, values = zip(*[(layer.keys, layer.values) for layer in layers], strict=True)
        return logits, torch.stack(keys), torch.stack(values)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights of `initializer_range`; DeepNorm's gain on value, output and MLP projections."""
        match module:
            case nn.Linear():
                std = self.config.initializer_range * getattr(module, "init_gain", 1.0)
                init.normal_(module.weight, mean=0.0, std=std)
                if module.bias is not None:
                    init.zeros_(module.bias)
            case nn.Embedding():
                init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            case ByteRouter():
                init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
                _start_at_zero(module.bias, module.e_score_correction_bias, module.noise_weight)
            case ByteExperts():
                for stack in (module.gate_up_proj, module.down_proj):
                    init.normal_(stack, mean=0.0, std=self.config.initializer_range * module.init_gain)
                _start_at_zero(module.gate_up_proj_bias, module.down_proj_bias)
            case ByteMultiHeadSelfAttention():
                _start_at_zero(module.softmax_sink)
            case ByteRMSNorm():
                init.constant_(module.weight, 0.0 if module.zero_centered else 1.0)
            case LayerScale():
                init.constant_(module.weight, module.start)
            case XPosRotaryEmbedding():
                if module.raw_decay is not None and not getattr(module.raw_decay, "_is_hf_initialized", False):
                    module.reset_parameters()


def _refuse_arguments(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    past_key_values: RelativeCache | None,
    cache: RelativeCache | None,
    return_dict: bool | None,
) -> None:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if past_key_values is not None and cache is not None:
        raise ValueError("give only one of past_key_values and cache: they are the same argument")
    if return_dict is False:
        raise ValueError("return_dict=False is not supported; the output is always a CausalLMOutputWithPast")


def _like(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor | None:
    return None if rows is None else rows.to(x)


def _refuse_with_memory(generation_config: Any) -> None:
    for name in ("num_beams", "num_return_sequences"):
        if (getattr(generation_config, name) or 1) > 1:
            raise ValueError(f"{name} must be 1 with a memory, which is extended by one answer for each prompt")
    if not generation_config.use_cache:
        raise ValueError("generate with a memory needs use_cache=True: otherwise every step would extend it anew")


def _start_at_zero(*parameters: torch.Tensor | None) -> None:
    for parameter in parameters:
        if parameter is not None:
            init.zeros_(parameter)


register_model_if_wanted()

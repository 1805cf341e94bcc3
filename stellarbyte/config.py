"""The shape of a ByteTransformer."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from stellarbyte.expert_options import check_experts

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
ROPE_TYPES = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor"},
    "longrope": {"factor", "original_max_position_embeddings"},
}
LAYER_TYPES = ("full_attention", "sliding_attention")
ROTATIONS = ("global", "local", "none")
BRANCH_NORMS = ("before", "after", "both")


@strict
class ByteModelConfig(PreTrainedConfig):
    """The configuration of a ByteTransformer, validated on creation.

    The defaults give a ByteTransformer with XPos. With only ``use_xpos=False`` changed the model *is*
    Llama; ``sliding_window`` makes it Mistral, ``attention_bias`` Qwen2, ``qk_norm`` Qwen3, ``num_experts`` Mixtral.
    docs/models.md lists what makes it other families.

    Args (in the groups of the fields below):
        num_key_value_heads: heads of keys and values (grouped-query attention); None: as many as query heads.
        head_dim: width of one head; None: hidden_size / num_attention_heads.
        hidden_act: the gate of the MLP: "silu", "gelu" (exact) or "gelu_tanh".
        max_position_embeddings: context length in tokens. No table has this length.
        attention_bias / attention_output_bias / mlp_bias: biases on q,k,v / on o / on gate, up and down.
        qk_norm: RMSNorm over each head of q and k before the rotation (Qwen3).
        qk_norm_per_head: False: those norms are over all heads of q, and over all heads of k (OLMo 2).
        branch_norms: RMSNorm "before" attention and MLP, "after" them and before the sum (OLMo 2), or "both" (Gemma 2).
        zero_centered_norms: norms multiply by 1 + weight (Gemma).
        sliding_window: a query at m sees keys n > m - sliding_window; None: all. In tokens.
        layer_types: "full_attention" or "sliding_attention" for each layer; None: all alike.
        full_attention_window: the same limit for full_attention layers; None: none. Serving sets it to its context
            length, so that a stream can outgrow that.
        sink_tokens: the first tokens of a sequence, which windowed layers always see (StreamingLLM).
        rope_parameters: {"rope_type": "default" | "linear" | "llama3" | "yarn" | "longrope", "rope_theta": ..., ...},
            as in transformers. With "partial_rotary_factor", that part of the pairs (j, j + head_dim / 2) is rotated.
            Longrope's factors are chosen by the length of a sequence, in serving by the served context length.
        local_rope_parameters: the same for "local" layers (Gemma 3, OLMo 3).
        layer_rotations: for each layer "global" (`rope_parameters`), "local" or "none" (SmolLM3; without XPos, too);
            None: all "global".
        use_xpos: multiply scores by the XPos decay (Sun et al. 2022); False: plain RoPE.
        xpos_scale_base / xpos_gamma: the paper's b (in tokens) and γ.
        xpos_learnable_scale: train the decay of each rotation pair, starting from the paper's values.
        layer_scale_init: start value of a learned factor per channel on each branch (Touvron et al. 2021); None: off.
        drop_path_rate: chance that a sample skips a branch in the last layer, growing linearly from 0 in the first.
        deepnorm: norm after the sum, residual scaled by (2N)^1/4, initial weights by (8N)^-1/4 (Wang et al. 2022).
        parallel_residual: attention and MLP read one norm and are added together.
        embedding_multiplier: factor of token embeddings, rounded to the model's dtype (Gemma, Granite).
        attention_multiplier: factor of attention scores (Granite; 1 / sqrt(Gemma's query_pre_attn_scalar)); None:
            head_dim^-0.5.
        residual_multiplier: factor of each branch in the sum (Granite).
        logits_multiplier: factor of logits (Granite).
        attention_softcap / logits_softcap: c of the cap c · tanh(x / c) on scores / on logits (Gemma 2); None: no cap.
        softmax_sink: a learned logit of each head takes part in the softmax over scores and has no value (gpt-oss), so
            that a head may attend to nothing. Not a token: unlike `sink_tokens`, it has no key and no position.
        attention_dropout / residual_dropout / embedding_dropout: in training only.
        num_experts: experts of a mixture-of-experts layer, in the place of its MLP; 0: every layer is dense.
        num_experts_per_tok: experts that a token chooses.
        moe_intermediate_size: inner width of an expert; None: intermediate_size.
        moe_layers: numbers of the layers that have experts; None: all.
        expert_pools: for each layer of moe_layers, the number of its pool; layers of one pool share its experts, each
            with a router of its own. None: a pool for each layer.
        expert_bias: biases on the gates, ups and downs of the experts that routers choose.
        swiglu_limit / swiglu_alpha: those experts compute (up + 1) · gate · sigmoid(swiglu_alpha · gate), the gate at
            most swiglu_limit, up within ±swiglu_limit (gpt-oss); None: act(gate) · up, as in MLPs.
        shared_expert_intermediate_size: inner width of an expert that every token uses; 0: none.
        shared_expert_gate: the shared expert's output is multiplied by a learned sigmoid (Qwen2-MoE).
        router_score: "softmax" or "sigmoid" of the router's logits; in float32.
        norm_topk_prob: divide the scores of the chosen experts by their sum (as a softmax over the chosen ones does).
        router_bias: a bias on the router's logits.
        router_selection_bias: a bias on the scores that only decides which experts are chosen (DeepSeek-V3).
        router_top_p: choose the fewest experts whose scores sum to this share, at least min_experts_per_tok and at most
            num_experts_per_tok; None: always num_experts_per_tok.
        router_top_p_start / router_top_p_steps: in training, the share grows linearly from the one to router_top_p
            within this number of steps (`ByteTransformer.set_training_step`).
        router_noise: in training, "noisy_top_k" adds learned normal noise to the logits (Shazeer et al. 2017),
            "gumbel" Gumbel noise; router_noise_scale multiplies it.
        capacity_factor: in training, an expert takes at most factor · choices / num_experts tokens of a batch; None:
            all that choose it.
        router_balance_coef / router_z_coef / router_entropy_coef / router_load_coef: factors of the auxiliary losses in
            the training loss; see `stellarbyte.model.moe.losses`.

    Raises:
        ValueError: a value is impossible or two contradict each other; the message names the field.
    """

    model_type = "bytetransformer"
    keys_to_ignore_at_inference: ClassVar = [  # a list, to which transformers' Trainer adds others
        *("past_key_values", "cache", "balance_loss", "z_loss", "router_entropy", "load_kl", "expert_load"),
    ]

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True

    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_per_head: bool = True
    branch_norms: str = "before"
    zero_centered_norms: bool = False

    sliding_window: int | None = None
    layer_types: list[str] | None = None
    full_attention_window: int | None = None
    sink_tokens: int = 0

    rope_parameters: dict[str, Any] | None = None
    local_rope_parameters: dict[str, Any] | None = None
    layer_rotations: list[str] | None = None
    use_xpos: bool = True
    xpos_scale_base: int = 512
    xpos_gamma: float = 0.4
    xpos_learnable_scale: bool = False

    layer_scale_init: float | None = None
    drop_path_rate: float | int = 0.0
    deepnorm: bool = False
    parallel_residual: bool = False

    embedding_multiplier: float | int = 1.0
    attention_multiplier: float | int | None = None
    residual_multiplier: float | int = 1.0
    logits_multiplier: float | int = 1.0
    attention_softcap: float | int | None = None
    logits_softcap: float | int | None = None
    softmax_sink: bool = False

    attention_dropout: float | int = 0.0
    residual_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0

    num_experts: int = 0
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    moe_layers: list[int] | None = None
    expert_pools: list[int] | None = None
    expert_bias: bool = False
    swiglu_limit: float | int | None = None
    swiglu_alpha: float | int | None = None
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    router_score: str = "softmax"
    norm_topk_prob: bool = True
    router_bias: bool = False
    router_selection_bias: bool = False
    router_top_p: float | int | None = None
    min_experts_per_tok: int = 1
    router_top_p_start: float | int | None = None
    router_top_p_steps: int = 0
    router_noise: str = "none"
    router_noise_scale: float | int = 1.0
    capacity_factor: float | int | None = None
    router_balance_coef: float | int = 0.0
    router_z_coef: float | int = 0.0
    router_entropy_coef: float | int = 0.0
    router_load_coef: float | int = 0.0

    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        _require_positive(
            self, "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
        )
        _require_positive(
            self, "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "xpos_scale_base", "xpos_gamma"
        )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size ({self.hidden_size}) is not a multiple of num_attention_heads "
                    f"({self.num_attention_heads}); give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.layer_types is None:
            kind = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [kind] * self.num_hidden_layers
        self._check_attention()
        self._check_norms_and_factors()
        self._check_training()
        if self.num_experts and self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        check_experts(self)
        super().__post_init__(**kwargs)
        self._check_rotations()

    def _check_attention(self) -> None:
        assert self.num_key_value_heads is not None and self.head_dim is not None and self.layer_types is not None
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})"
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: it is rotated in pairs")
        if self.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.hidden_act!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window ({self.sliding_window}) must be at least 1, or null for no window")
        if self.full_attention_window is not None and self.full_attention_window < 1:
            raise ValueError(f"full_attention_window ({self.full_attention_window}) must be at least 1, or null")
        if self.sink_tokens < 0:
            raise ValueError(f"sink_tokens ({self.sink_tokens}) must not be negative")
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types names {len(self.layer_types)} layers, num_hidden_layers is {self.num_hidden_layers}"
            )
        if unknown := sorted(set(self.layer_types) - set(LAYER_TYPES)):
            raise ValueError(f"layer_types holds {unknown[0]!r}; known are {', '.join(LAYER_TYPES)}")
        if "sliding_attention" in self.layer_types and self.sliding_window is None:
            raise ValueError("layer_types has sliding_attention layers but sliding_window is null")

    def _check_training(self) -> None:
        for name in ("attention_dropout", "residual_dropout", "embedding_dropout", "drop_path_rate"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 0 and less than 1")
        if self.xpos_learnable_scale and not self.use_xpos:
            raise ValueError("xpos_learnable_scale needs use_xpos")

    def _check_norms_and_factors(self) -> None:
        if self.branch_norms not in BRANCH_NORMS:
            raise ValueError(f"branch_norms {self.branch_norms!r} is not one of {', '.join(BRANCH_NORMS)}")
        if self.branch_norms != "before":
            for name in ("deepnorm", "parallel_residual"):
                if getattr(self, name):
                    raise ValueError(f"{name} needs branch_norms before, got {self.branch_norms}")
        if not self.qk_norm and not self.qk_norm_per_head:
            raise ValueError("qk_norm_per_head is false but qk_norm is, too: there is no norm of queries and keys")
        _require_positive(self, "embedding_multiplier", "residual_multiplier", "logits_multiplier")
        for name in ("attention_multiplier", "attention_softcap", "logits_softcap"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be greater than 0, or null")

    def _check_rotations(self) -> None:
        if len(self.rotations) != self.num_hidden_layers:
            raise ValueError(
                f"layer_rotations names {len(self.rotations)} layers, num_hidden_layers is {self.num_hidden_layers}"
            )
        if unknown := sorted(set(self.rotations) - set(ROTATIONS)):
            raise ValueError(f"layer_rotations holds {unknown[0]!r}; known are {', '.join(ROTATIONS)}")
        if ("local" in self.rotations) != (self.local_rope_parameters is not None):
            raise ValueError("local_rope_parameters and local layers in layer_rotations need each other")
        assert self.rope_parameters is not None  # the base class filled it in
        _check_rope("rope_parameters", self.rope_parameters, self.head_dim or 0)
        if self.local_rope_parameters is not None:
            _check_rope("local_rope_parameters", self.local_rope_parameters, self.head_dim or 0)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer in tokens; None: no window."""
        assert self.layer_types is not None
        window_of = {"sliding_attention": self.sliding_window, "full_attention": self.full_attention_window}
        return tuple(window_of[kind] for kind in self.layer_types)

    @property
    def expert_layers(self) -> tuple[int | None, ...]:
        """For each layer, the layer whose experts it uses: itself, or the first of its pool; None: it is dense."""
        owners: list[int | None] = [None] * self.num_hidden_layers
        if self.num_experts:
            layers = range(self.num_hidden_layers) if self.moe_layers is None else self.moe_layers
            pools = layers if self.expert_pools is None else self.expert_pools
            first: dict[int, int] = {}
            for layer, pool in zip(layers, pools, strict=True):
                owners[layer] = first.setdefault(pool, layer)
        return tuple(owners)

    @property
    def rotations(self) -> tuple[str, ...]:
        """The rotation of each layer: "global", "local" or "none"."""
        return tuple(["global"] * self.num_hidden_layers if self.layer_rotations is None else self.layer_rotations)

    @property
    def context_length(self) -> int:
        """Tokens of the longest sequence that does not slide: that of the model, or the one that is served."""
        if self.full_attention_window is None:
            return self.max_position_embeddings
        return self.full_attention_window + self.sink_tokens

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """eos_token_id as a tuple: it may be None, one id or a list."""
        if self.eos_token_id is None:
            return ()
        return (self.eos_token_id,) if isinstance(self.eos_token_id, int) else tuple(self.eos_token_id)


def _require_positive(config: ByteModelConfig, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} ({getattr(config, name)}) must be greater than 0")


def _check_rope(field: str, rope: dict[str, Any], head_dim: int) -> None:
    """`field` is the name of `rope` in errors."""
    rope_type = rope.get("rope_type")
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"{field}: rope_type {rope_type!r} is not one of {', '.join(ROPE_TYPES)}")
    for name in sorted(ROPE_TYPES[rope_type] | {"rope_theta"}):
        if not isinstance(rope.get(name), int | float) or rope[name] <= 0:
            raise ValueError(f"{field}: rope_type {rope_type} needs {name} greater than 0, got {rope.get(name)!r}")
    part = rope.get("partial_rotary_factor")
    if part is not None and (not 0 < part <= 1 or int(head_dim * part) < 2 or int(head_dim * part) % 2):
        raise ValueError(f"{field}: partial_rotary_factor {part} of {head_dim} channels is not an even number of them")
    rotated = head_dim if part is None else int(head_dim * part)
    for name in ("short_factor", "long_factor") if rope_type == "longrope" else ():
        factors = rope.get(name)
        if not isinstance(factors, list) or len(factors) != rotated // 2 or not all(factor > 0 for factor in factors):
            raise ValueError(f"{field}: {name} must be a list of {rotated // 2} numbers greater than 0")

"""Which tensors a ByteTransformer checkpoint holds. Pure; knows no files and builds no model."""

from stellarbyte.config import ByteModelConfig

Shape = tuple[int, ...]


def expected_shapes(config: ByteModelConfig) -> dict[str, Shape]:
    """Name and shape of every parameter that `config` implies, in the model's own order.

    The names are those of transformers' Llama classes. A tied lm_head is not stored.
    """
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in _layer_shapes(config).items()}
    shapes["model.norm.weight"] = (config.hidden_size,)
    if config.xpos_learnable_scale:
        shapes["model.rotary.raw_decay"] = (_head_dim(config) // 2,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def _layer_shapes(config: ByteModelConfig) -> dict[str, Shape]:
    hidden, inner, head_dim = config.hidden_size, config.intermediate_size, _head_dim(config)
    queries = config.num_attention_heads * head_dim
    keys = (config.num_key_value_heads or config.num_attention_heads) * head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden, config.attention_bias),
        "self_attn.k_proj": (keys, hidden, config.attention_bias),
        "self_attn.v_proj": (keys, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, queries, config.attention_output_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    shapes: dict[str, Shape] = {}
    for name, (rows, columns, bias) in linears.items():
        shapes[f"{name}.weight"] = (rows, columns)
        if bias:
            shapes[f"{name}.bias"] = (rows,)
    if config.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (head_dim,), "self_attn.k_norm.weight": (head_dim,)}
    vectors = ["input_layernorm"]
    if not config.parallel_residual:
        vectors.append("post_attention_layernorm")
    if config.layer_scale_init is not None:
        vectors += ["attention_scale", "mlp_scale"]
    return shapes | {f"{name}.weight": (hidden,) for name in vectors}


def _head_dim(config: ByteModelConfig) -> int:
    return config.head_dim if config.head_dim is not None else config.hidden_size // config.num_attention_heads

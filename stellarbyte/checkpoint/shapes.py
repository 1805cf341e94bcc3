"""Names and shapes of the tensors in a ByteTransformer checkpoint, from its config alone."""

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.parts import Shape, layer_parts, module_path, parameter_shapes

_STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def expected_shapes(config: ByteModelConfig) -> dict[str, Shape]:
    """Name and shape of every parameter that `config` implies, in the model's own order.

    A tied lm_head is not stored.
    """
    assert config.head_dim is not None  # the config fills it in
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        for part in layer_parts(config, layer):
            for name, shape in parameter_shapes(part, config, layer).items():
                shapes[module_path(layer, name)] = shape
    shapes["model.norm.weight"] = (config.hidden_size,)
    if config.xpos_learnable_scale:
        shapes["model.rotary.raw_decay"] = (config.head_dim // 2,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def matrix_names(config: ByteModelConfig) -> set[str]:
    """The parameters that may be quantized: weights of linears, stacks of experts, and the head."""
    names = set() if config.tie_word_embeddings else {"lm_head.weight"}
    for layer in range(config.num_hidden_layers):
        for part in layer_parts(config, layer):
            if part.reads is not None:
                names.add(module_path(layer, f"{part.name}.weight"))
            elif part.name in _STACKS:
                names.add(module_path(layer, part.name))
    return names

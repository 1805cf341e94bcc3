"""Names and shapes of the tensors in a ByteTransformer checkpoint, from its config alone."""

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.parts import Shape, layer_parts, module_path, parameter_shapes


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

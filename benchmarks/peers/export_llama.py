"""`python -m benchmarks.peers.export_llama SRC DST`: a ByteTransformer folder as a plain Llama one, for other servers.

The tensors already have Llama's names; only the config differs. SRC may be "demo". The folder defines no
end-of-sequence token, so that answers have `max_tokens` tokens, also on servers without `ignore_eos`.
"""

import argparse
import shutil
from pathlib import Path

from transformers import LlamaConfig

from stellarbyte.checkpoint.native import open_checkpoint
from stellarbyte.checkpoint.source import resolve_model
from stellarbyte.config import ByteModelConfig

SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "bos_token_id",
    "pad_token_id",
)  # fields with the same meaning in both


def llama_config(config: ByteModelConfig) -> LlamaConfig:
    """The config as Llama's; ValueError if the model has parts that Llama lacks."""
    extras = (
        "use_xpos",
        "deepnorm",
        "parallel_residual",
        "qk_norm",
        "sliding_window",
        "sink_tokens",
        "layer_scale_init",
    )
    used = [name for name in extras if getattr(config, name)]
    if config.attention_output_bias != config.attention_bias:
        used.append("attention_output_bias")
    if used:
        raise ValueError(f"Llama has no {', '.join(used)}")
    shared = {name: getattr(config, name) for name in SHARED}
    return LlamaConfig(**shared, eos_token_id=None, architectures=["LlamaForCausalLM"], dtype="float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("src")
    parser.add_argument("dst", type=Path)
    options = parser.parse_args()
    source = resolve_model(options.src)
    config = llama_config(open_checkpoint(source).config)
    options.dst.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix == ".safetensors" or file.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(file, options.dst)
    config.save_pretrained(options.dst)
    print(options.dst)


if __name__ == "__main__":
    main()

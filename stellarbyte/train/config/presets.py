"""Shapes of native models by name: XPos, a sliding window and sinks. The vocabulary is the tokenizer's."""

from typing import Any

_NATIVE: dict[str, Any] = {
    "use_xpos": True,
    "sliding_window": 256,
    "sink_tokens": 4,
    "qk_norm": True,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
}

# Parameters are counted with a vocabulary of 8,192.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny-1m": _NATIVE
    | {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4},
    "poet-30m": _NATIVE
    | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "storyteller-47m": _NATIVE
    | {"hidden_size": 512, "intermediate_size": 1664, "num_hidden_layers": 12, "num_attention_heads": 8},
    "base-98m": _NATIVE
    | {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "num_attention_heads": 12},
}

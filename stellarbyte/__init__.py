"""StellarByte's model library: ByteTransformer, its checkpoints, caches and adapters.

Importing it registers the model with transformers' AutoConfig and AutoModelForCausalLM. Names are imported on
first use, because torch and transformers take seconds to import, and some commands need neither.
"""

import importlib
from typing import TYPE_CHECKING, Any

from stellarbyte.model.auto import register_when_imported

if TYPE_CHECKING:
    from stellarbyte.config import ByteModelConfig
    from stellarbyte.config import ByteModelConfig as ByteConfig
    from stellarbyte.lora import LoRAConfig
    from stellarbyte.model.transformer import ByteTransformer

__all__ = ["ByteConfig", "ByteModelConfig", "ByteTransformer", "LoRAConfig"]

_HOMES = {
    "ByteConfig": ("stellarbyte.config", "ByteModelConfig"),
    "ByteModelConfig": ("stellarbyte.config", "ByteModelConfig"),
    "ByteTransformer": ("stellarbyte.model.transformer", "ByteTransformer"),
    "LoRAConfig": ("stellarbyte.lora", "LoRAConfig"),
}

register_when_imported()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, original = _HOMES[name]
    return getattr(importlib.import_module(module), original)

"""StellarByte's model library: ByteTransformer, its checkpoints, caches and adapters.

Importing it registers the model with transformers' AutoConfig and AutoModelForCausalLM.
"""

from typing import TYPE_CHECKING, Any

from stellarbyte.auto import register_when_imported
from stellarbyte.config import ByteModelConfig
from stellarbyte.lora import LoRAConfig

if TYPE_CHECKING:
    from stellarbyte.model.transformer import ByteTransformer

ByteConfig = ByteModelConfig

__all__ = ["ByteConfig", "ByteModelConfig", "ByteTransformer", "LoRAConfig"]

register_when_imported()


def __getattr__(name: str) -> Any:
    if name == "ByteTransformer":  # imported when first used: transformers' model classes take seconds
        from stellarbyte.model.transformer import ByteTransformer

        return ByteTransformer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

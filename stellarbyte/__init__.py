"""StellarByte's model library: ByteTransformer, its checkpoints, caches and adapters.

Importing it registers the model with transformers' AutoConfig and AutoModelForCausalLM.
"""

from stellarbyte.config import ByteModelConfig
from stellarbyte.lora import LoRAConfig
from stellarbyte.model import ByteTransformer

ByteConfig = ByteModelConfig

__all__ = ["ByteConfig", "ByteModelConfig", "ByteTransformer", "LoRAConfig"]

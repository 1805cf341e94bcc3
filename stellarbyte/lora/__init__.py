"""Low-rank adapters."""

from stellarbyte.lora.config import LoRAConfig
from stellarbyte.lora.layers import LoRALinear, apply_lora_to_model

__all__ = ["LoRAConfig", "LoRALinear", "apply_lora_to_model"]

"""Low-rank adapters: in a model for training, in PEFT's files, and packed for serving."""

from stellarbyte.lora.adapted_model import (
    activate_lora,
    apply_lora_to_model,
    deactivate_lora,
    merge_lora,
    quantize_frozen,
    remove_lora,
    unmerge_lora,
)
from stellarbyte.lora.config import LoRAConfig
from stellarbyte.lora.freezing import freeze, unfreeze
from stellarbyte.lora.layers import LoRALayer
from stellarbyte.lora.peft_config import AdapterError
from stellarbyte.lora.peft_format import Adapter, read_adapter
from stellarbyte.lora.saved_adapters import load_adapter, save_adapter

__all__ = [
    "Adapter",
    "AdapterError",
    "LoRAConfig",
    "LoRALayer",
    "activate_lora",
    "apply_lora_to_model",
    "deactivate_lora",
    "freeze",
    "load_adapter",
    "merge_lora",
    "quantize_frozen",
    "read_adapter",
    "remove_lora",
    "save_adapter",
    "unfreeze",
    "unmerge_lora",
]

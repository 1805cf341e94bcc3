"""Low-rank adapters: in a model for training, in PEFT's files, and packed for serving."""

from stellarbyte.lora.config import LoRAConfig
from stellarbyte.lora.freezing import freeze, unfreeze
from stellarbyte.lora.layers import (
    LoRALinear,
    activate_lora,
    apply_lora_to_model,
    deactivate_lora,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from stellarbyte.lora.peft_config import AdapterError
from stellarbyte.lora.peft_format import Adapter, load_adapter, read_adapter, save_adapter

__all__ = [
    "Adapter",
    "AdapterError",
    "LoRAConfig",
    "LoRALinear",
    "activate_lora",
    "apply_lora_to_model",
    "deactivate_lora",
    "freeze",
    "load_adapter",
    "merge_lora",
    "read_adapter",
    "remove_lora",
    "save_adapter",
    "unfreeze",
    "unmerge_lora",
]

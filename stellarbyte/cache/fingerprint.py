"""What a model in memory computes, as a hash: of its config, its weights and its active adapters."""

import hashlib
import json

import torch
from torch import nn

from stellarbyte.config import ByteModelConfig

# Fields of the config that change no hidden state in evaluation.
_IRRELEVANT = {
    *("initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
    *("attention_dropout", "residual_dropout", "embedding_dropout", "drop_path_rate"),
    *("router_noise", "router_noise_scale", "capacity_factor", "router_top_p_start", "router_top_p_steps"),
    *("router_balance_coef", "router_z_coef", "router_entropy_coef", "router_load_coef"),
}


def fingerprint(model: nn.Module) -> str:
    """SHA-256 (hex); reads every weight once. The same weights in another dtype are another model.

    Args:
        model: a ByteTransformer, with or without LoRA.
    """
    config = model.config
    fields = {name: getattr(config, name) for name in ByteModelConfig.__annotations__ if name not in _IRRELEVANT}
    # The state dict holds the weights of all adapters; a wrapper of LoRA knows which of them are active, and the factor
    # and the activation of each one that is added (a copy of the module has neither).
    adapters = {
        name: [
            (adapter, getattr(module, "scales", {}).get(adapter), module.configs[adapter].activation)
            for adapter in module.active
        ]
        for name, module in model.named_modules()
        if getattr(module, "active", ())
    }
    digest = hashlib.sha256(json.dumps([fields, adapters], sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""Adds LoRA adapters to a model for training. Knows nothing of serving or of files."""

import math
from typing import TypeVar

import torch
from torch import nn

from stellarbyte.lora.config import LoRAConfig

Model = TypeVar("Model", bound=nn.Module)


class LoRALinear(nn.Module):
    """A linear layer, frozen, plus a low-rank update. A starts random and B at zero: at first nothing changes."""

    def __init__(self, base: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        self.base_layer = base
        self.scale = config.scale
        self.dropout = nn.Dropout(config.lora_dropout)
        factory = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Linear(base.in_features, config.r, bias=False, **factory)
        self.lora_B = nn.Linear(config.r, base.out_features, bias=False, **factory)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.scale * self.lora_B(self.lora_A(self.dropout(x)))


def apply_lora_to_model(model: Model, config: LoRAConfig) -> Model:
    """Wrap every targeted linear module of `model` in place and freeze all but the LoRA parameters; returns `model`.

    Modules that already carry an adapter are left as they are.

    Raises:
        ValueError: no linear module's name ends in one of `config.target_modules`.
    """
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name.rpartition(".")[2] in config.target_modules
        and not any(name.startswith(f"{parent}.") for parent in adapted)
    ]
    if not targets and not adapted:
        raise ValueError(f"target_modules {list(config.target_modules)} match no linear module of the model")
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in parameter_name)
    for name in targets:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        model.set_submodule(name, LoRALinear(linear, config))
    return model

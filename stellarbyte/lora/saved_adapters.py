"""Adapters of a model in PEFT's files: read into a model and written from one."""

import dataclasses
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from stellarbyte.checkpoint.safetensors_file import write_file
from stellarbyte.lora.adapted_model import (
    Model,
    activate_lora,
    adaptable_layers,
    adapter_layers,
    adapter_names,
    add_adapter,
    copied_modules,
    outer_modules,
    refuse_unknown,
)
from stellarbyte.lora.config import LoRAConfig
from stellarbyte.lora.layers import AdapterLayer, LoRALayer, LowRank, weight_shape
from stellarbyte.lora.peft_config import BEYOND_PLAIN, config_json
from stellarbyte.lora.peft_format import CONFIG_FILE, PREFIX, WEIGHTS_FILE, read_adapter

_FILE_KEYS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
MAX_OWN_RANK = 1 << 16  # where the caller chose the files


def load_adapter(model: Model, folder: str | os.PathLike[str], name: str = "default") -> Model:
    """Add the adapter in `folder`, in PEFT's layout, and make it the active one; returns `model`.

    Its weights are not trainable, the base model's do not change, and the model is put into evaluation mode. Merged
    adapters are unmerged first, and deactivated LoRA is activated.

    Raises:
        AdapterError: as `read_adapter`.
        ValueError: the model has an adapter of that name, or torch rejects the name.
    """
    if name in adapter_names(model):
        raise ValueError(f"the model already has an adapter {name!r}; remove it first or give another name")
    adapter = read_adapter(
        Path(folder) / CONFIG_FILE,
        Path(folder) / WEIGHTS_FILE,
        {module: weight_shape(layer) for module, layer in adaptable_layers(model).items()},
        max_rank=MAX_OWN_RANK,
        accepts=BEYOND_PLAIN,
        copies=_parameter_shapes(model),
    )
    config = adapter.config
    if isinstance(config.target_modules, str):  # an untrusted regular expression: never run
        config = dataclasses.replace(config, target_modules=tuple(adapter.weights))
    weights = {module: LowRank(a, b, adapter.magnitudes.get(module)) for module, (a, b) in adapter.weights.items()}
    copies = {
        module: {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in adapter.copies.items()
            if name.startswith(f"{module}.")
        }
        for module in copied_modules(model, config)
    }
    add_adapter(model, name, config, weights, copies)
    activate_lora(model, name)
    model.eval()
    return model


def _parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's own parameters by their names without LoRA."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in outer_modules(model).items():
        base = module.base_layer if isinstance(module, AdapterLayer) else module
        shapes |= {f"{name}.{key}": tuple(own.shape) for key, own in base.named_parameters(recurse=False)}
    return shapes


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> None:
    """Write one adapter of `model` into `folder` in PEFT's layout, for PEFT and `load_adapter`.

    PEFT refuses a non-linear adapter (`LoRAConfig.activation`), whose config has another peft_type. Existing files are
    replaced atomically.

    Raises:
        ValueError: the model has no adapter of that name, or its layers have it from different configs.
        OSError: the folder cannot be written.
    """
    refuse_unknown(model, name)
    layers = {module: layer for module, layer in sorted(adapter_layers(model).items()) if name in layer.configs}
    tensors = {
        f"{PREFIX}{module}.{_FILE_KEYS.get(key, key)}": parameter.detach().cpu()
        for module, layer in layers.items()
        for key, parameter in layer.parameters_of(name).items()
    }
    low_rank = {module: layer for module, layer in layers.items() if isinstance(layer, LoRALayer)}
    config = _config_of(model, {module: layer.configs[name] for module, layer in low_rank.items()})
    text = config_json(config, is_causal_lm=hasattr(model, "prepare_inputs_for_generation"))
    folder, suffix = Path(folder), f".partial-{secrets.token_hex(4)}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        layout = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
        write_file(folder / (WEIGHTS_FILE + suffix), layout, tensors.values())
        (folder / (CONFIG_FILE + suffix)).write_text(text, encoding="utf-8")
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(folder / (file + suffix), folder / file)
    finally:
        for file in (WEIGHTS_FILE, CONFIG_FILE):
            (folder / (file + suffix)).unlink(missing_ok=True)


def _config_of(model: nn.Module, configs: Mapping[str, LoRAConfig]) -> LoRAConfig:
    """One config for an adapter's layers; target_modules lists them unless the given one selects exactly them."""
    modules = tuple(configs)
    first = configs[modules[0]]
    listed = dataclasses.replace(first, target_modules=modules)
    if any(dataclasses.replace(other, target_modules=modules) != listed for other in configs.values()):
        raise ValueError("the adapter's layers have it from different configs; give each config its own adapter name")
    if first.targets_all_linear:
        return listed  # as PEFT writes it
    meant = {module for module in outer_modules(model) if first.targets(module)}
    return first if meant == set(modules) else listed

"""Adapters in a model: added, activated, merged and removed.

Layers with adapters replace the model's own. While LoRA is deactivated, the original layers are back in place and the
wrappers are in the model's plain attribute `_lora_aside`, a dict by dotted module name: not a submodule, so neither
`state_dict` nor `parameters` includes them. All functions take the model that `apply_lora_to_model` was called with.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from torch import nn

from stellarbyte.lora.config import LoRAConfig
from stellarbyte.lora.invocation import tokens_of
from stellarbyte.lora.layers import (
    AdapterLayer,
    LoRAConv2d,
    LoRALayer,
    LoRALinear,
    LowRank,
    TrainedCopies,
    is_adaptable,
    is_conv1d,
)
from stellarbyte.lora.quantized_base import FrozenInt8Linear

Model = TypeVar("Model", bound=nn.Module)
Copies = Mapping[str, Mapping[str, torch.Tensor] | None]  # module → its parameters; None: as the model's

ASIDE = "_lora_aside"


def outer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its dotted name as it was before LoRA: a wrapper counts as its layer, without its parts."""
    wrappers = [module for module in model.modules() if isinstance(module, AdapterLayer)]
    parts = {part for wrapper in wrappers for part in wrapper.modules() if part is not wrapper}
    return {name: module for name, module in model.named_modules() if name and module not in parts}


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that can have low-rank adapters by its dotted name, wrapped or not."""
    return {name: module for name, module in outer_modules(model).items() if is_adaptable(module)}


def targeted_layers(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The layers to which `config` adds low-rank matrices, by their dotted names."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: layer
        for name, layer in adaptable_layers(model).items()
        if config.targets(name)
        and not (config.targets_all_linear and (layer is head or isinstance(_unwrapped(layer), nn.Conv2d)))
    }


def copied_modules(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The modules that `config.modules_to_save` names, by their dotted names."""
    return {name: module for name, module in outer_modules(model).items() if config.copies(name)}


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """Every wrapper by the dotted name of the module it wraps; while LoRA is deactivated, those kept aside."""
    standing = {name: layer for name, layer in outer_modules(model).items() if isinstance(layer, AdapterLayer)}
    aside: dict[str, AdapterLayer] = getattr(model, ASIDE, {})
    return standing | aside


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the model's adapters, active or not."""
    return sorted({name for layer in adapter_layers(model).values() for name in layer.configs})


def refuse_unknown(model: nn.Module, *names: str) -> None:
    """Raise ValueError for the first of `names` that no adapter of the model has."""
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(map(repr, known)) or 'none'}")


def apply_lora_to_model(model: Model, config: LoRAConfig, name: str = "default") -> Model:
    """Add a new adapter to every targeted layer of `model`, in place, and make it the active one.

    Only its parameters stay trainable. Layers that already have an adapter of that name keep it. Merged adapters are
    unmerged first, and deactivated LoRA is activated. Returns `model`.

    Raises:
        ValueError: no layer is targeted, an entry of `config.modules_to_save` matches no module, a layer does not fit
            the config, or torch rejects the name; the model is then unchanged.
    """
    targets, copies = targeted_layers(model, config), copied_modules(model, config)
    if not targets:
        given = config.target_modules
        shown = repr(given) if isinstance(given, str) else list(given)
        raise ValueError(f"target_modules {shown} match no linear module of the model")
    for entry in config.modules_to_save:
        if not any(module_name.endswith(entry) for module_name in copies):
            raise ValueError(f"modules_to_save has {entry!r}, which matches no module of the model")
    add_adapter(model, name, config, dict.fromkeys(targets), dict.fromkeys(copies))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    activate_lora(model, name)
    return model


def add_adapter(
    model: nn.Module, name: str, config: LoRAConfig, weights: Mapping[str, LowRank | None], copies: Copies
) -> None:
    """Add an adapter, inactive, to the layers that `weights` and `copies` name and that have none of that name.

    Raises:
        ValueError: torch rejects the name, or a layer does not fit; the model is then unchanged.
    """
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"adapter name {name!r} must not be empty, contain a dot or be an attribute of torch's modules"
        )
    aside: dict[str, AdapterLayer] = getattr(model, ASIDE, {})
    if config.alora_invocation_tokens is not None:
        _check_invocation(model, config.alora_invocation_tokens, weights)
    for module_name in weights:
        _check_fit(module_name, aside.get(module_name, model.get_submodule(module_name)), config)
    for module_name in copies:
        standing = aside.get(module_name, model.get_submodule(module_name))
        if module_name in weights or isinstance(standing, LoRALayer):
            raise ValueError(f"modules_to_save may not contain {module_name}, which has low-rank matrices")
    unmerge_lora(model)
    _put_back(model)
    for module_name, given in weights.items():
        layer = model.get_submodule(module_name)
        if not isinstance(layer, LoRALayer):
            layer = LoRAConv2d(layer) if isinstance(layer, nn.Conv2d) else LoRALinear(layer)
        if name not in layer.configs:
            layer.add_adapter(name, module_name, config, given)
        if config.alora_invocation_tokens is not None:
            layer.tokens = tokens_of(model)
        model.set_submodule(module_name, layer)
    for module_name, parameters in copies.items():
        module = model.get_submodule(module_name)
        copied = module if isinstance(module, TrainedCopies) else TrainedCopies(module)
        if name not in copied.configs:
            copied.add_copy(name, config, parameters)
        model.set_submodule(module_name, copied)


def _check_invocation(model: nn.Module, invocation: Iterable[int], module_names: Iterable[str]) -> None:
    """ValueError if a model has no such tokens, or an activated adapter would change its output head."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    vocab_size = getattr(embedding, "num_embeddings", None)
    if vocab_size is not None and (token := max(invocation)) >= vocab_size:
        raise ValueError(f"alora_invocation_tokens has {token}, but the model has {vocab_size} tokens")
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if of_head := [name for name in module_names if model.get_submodule(name) is head]:
        raise ValueError(f"alora_invocation_tokens cannot be combined with {of_head[0]}, the output head")


def _check_fit(module_name: str, layer: nn.Module, config: LoRAConfig) -> None:
    """ValueError if a layer cannot have matrices of this config."""
    base = _unwrapped(layer)
    if isinstance(layer, TrainedCopies):
        raise ValueError(f"{module_name} is in modules_to_save of another adapter; it cannot have low-rank matrices")
    if config.fan_in_fan_out != is_conv1d(base):
        raise ValueError(
            f"fan_in_fan_out must be {is_conv1d(base)}: {module_name} is a {type(base).__name__}, "
            f"which stores its weight {'[in, out]' if is_conv1d(base) else '[out, in]'}"
        )
    if isinstance(base, nn.Conv2d) and base.groups != 1:
        raise ValueError(f"{module_name} is a Conv2d of {base.groups} groups; only those of one can be adapted")
    if isinstance(base, nn.Conv2d) and config.alora_invocation_tokens is not None:
        raise ValueError(f"alora_invocation_tokens must be None: {module_name} is a Conv2d")
    if isinstance(base, nn.Conv2d) and config.use_dora:
        raise ValueError(f"use_dora must be False: {module_name} is a Conv2d, and DoRA is for linear layers only")


def _unwrapped(layer: nn.Module) -> nn.Module:
    return layer.base_layer if isinstance(layer, AdapterLayer) else layer


def quantize_frozen(model: Model) -> Model:
    """Replace every nn.Linear but the output head, in place, by a frozen one with weights of 8 bits; returns `model`.

    Before or after `apply_lora_to_model`: low-rank matrices keep their dtype and train as before. There is no way back.
    Merged adapters are unmerged first.
    """
    unmerge_lora(model)
    is_aside = bool(getattr(model, ASIDE, {}))
    _put_back(model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, layer in adaptable_layers(model).items():
        base = _unwrapped(layer)
        if not isinstance(base, nn.Linear) or layer is head:
            continue
        quantized = FrozenInt8Linear(base)
        if isinstance(layer, AdapterLayer):
            layer.base_layer = quantized
        else:
            model.set_submodule(name, quantized)
    if is_aside:
        deactivate_lora(model)
    return model


def activate_lora(model: nn.Module, *names: str) -> None:
    """Activate exactly these adapters, whose outputs add up; restores the wrappers if LoRA was deactivated.

    Of the LoRA parameters only theirs are then trainable, except frozen ones, as those loaded from files are until
    `unfreeze`. Merged adapters are unmerged first.

    Raises:
        ValueError: no name is given, a name is unknown, or two of them have a copy of one module; nothing changes.
    """
    if not names:
        raise ValueError("activate_lora needs the name of at least one adapter")
    refuse_unknown(model, *names)
    for module_name, layer in adapter_layers(model).items():
        if isinstance(layer, TrainedCopies) and len(layer.configs.keys() & set(names)) > 1:
            raise ValueError(f"only one active adapter may have {module_name} in its modules_to_save")
    unmerge_lora(model)
    _put_back(model)
    for layer in adapter_layers(model).values():
        layer.activate(names)


def deactivate_lora(model: nn.Module) -> None:
    """Restore the model's original layers, the same objects; `activate_lora` restores the adapters.

    Merged adapters are unmerged first. Frozen parameters stay frozen. Does nothing if LoRA is not active.
    """
    unmerge_lora(model)
    wrapped = adapter_layers(model)
    for module_name, layer in wrapped.items():
        model.set_submodule(module_name, layer.base_layer)
    setattr(model, ASIDE, wrapped)


def remove_lora(model: nn.Module, name: str) -> None:
    """Remove one adapter; a layer without another becomes the original layer. Merged adapters are unmerged first.

    Raises:
        ValueError: the model has no adapter of that name.
    """
    refuse_unknown(model, name)
    unmerge_lora(model)
    aside: dict[str, AdapterLayer] = getattr(model, ASIDE, {})
    for module_name, layer in adapter_layers(model).items():
        if name in layer.configs:
            layer.remove_adapter(name)
        if not layer.configs and aside.pop(module_name, None) is None:
            model.set_submodule(module_name, layer.base_layer)


def merge_lora(model: nn.Module) -> None:
    """Add the active adapters to the weights, so that the forward costs no more than without LoRA.

    A layer with active adapters gets a new weight; a weight tied to it (an embedding) does not change. Does nothing if
    adapters are already merged or LoRA is deactivated.

    Raises:
        ValueError: an active adapter is not linear, or an adapted layer is quantized; nothing changes.
    """
    if getattr(model, ASIDE, {}):
        return
    layers = adapter_layers(model)
    for name, layer in layers.items():
        if not layer.merged and (reason := layer.why_not_merged()) is not None:
            raise ValueError(f"{name} cannot be merged: {reason}")
    for layer in layers.values():
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`: restores the same weight tensors, bit for bit. Does nothing without a merge."""
    for layer in adapter_layers(model).values():
        layer.unmerge()


def _put_back(model: nn.Module) -> None:
    """Undo `deactivate_lora`: puts the wrappers back, on the model's device and in its training mode."""
    aside: dict[str, AdapterLayer] = getattr(model, ASIDE, {})
    for module_name, layer in aside.items():
        layer.follow_base()
        model.set_submodule(module_name, layer)
    aside.clear()

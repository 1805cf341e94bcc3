"""Linear layers with low-rank adapters, and the functions that put them into a model.

Adapters have names. `LoRALinear` modules replace the linear layers and hold the adapters. While LoRA is deactivated,
the original layers are back in place and the wrappers are in the model's plain attribute `_lora_aside`, a dict by
dotted module name: not a submodule, so neither `state_dict` nor `parameters` includes them. All functions take the
model that `apply_lora_to_model` was called with.
"""

import math
from collections.abc import Mapping, Set
from typing import TypeVar

import torch
from torch import nn

from stellarbyte.lora.config import LoRAConfig

Model = TypeVar("Model", bound=nn.Module)
Weights = tuple[torch.Tensor, torch.Tensor]  # A [r, in], B [out, r]

ASIDE = "_lora_aside"


class LoRALinear(nn.Module):
    """A linear layer plus, for every active adapter, scale · B A dropout(x).

    `base_layer` is an nn.Linear, or a Conv1D of transformers (weights [in, out]). `active` names the adapters in
    use, in the order of addition. While merged, the forward is the base layer's alone; unmerge before any change of
    adapters.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.in_features, self.out_features = features(base)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.scales: dict[str, float] = {}
        self.configs: dict[str, LoRAConfig] = {}
        self.frozen: set[tuple[str, str]] = set()  # adapter and "A" or "B"; other matrices train while active
        self.active: tuple[str, ...] = ()
        self._unmerged: list[nn.Parameter] = []  # the base's own weight while merged; in a list: not registered
        self.train(base.training)

    @property
    def merged(self) -> bool:
        return bool(self._unmerged)

    def add_adapter(self, name: str, module_name: str, config: LoRAConfig, given: Weights | None = None) -> None:
        """Add an adapter, inactive. Without `given` A is random and B zero, so the output does not change.

        New weights take the base's dtype. Given ones are copied, keep their dtype if it is wider, and are not
        trained.
        """
        base = self._base_weight()
        dtype = base.dtype
        for weight in given or ():
            dtype = torch.promote_types(dtype, weight.dtype)
        rank = config.rank_of(module_name) if given is None else len(given[0])
        a = nn.Linear(self.in_features, rank, bias=False, device=base.device, dtype=dtype)
        b = nn.Linear(rank, self.out_features, bias=False, device=base.device, dtype=dtype)
        with torch.no_grad():
            if given is None:
                nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
                nn.init.zeros_(b.weight)
            else:
                a.weight.copy_(given[0])
                b.weight.copy_(given[1])
                self.frozen |= {(name, "A"), (name, "B")}
        self.lora_A[name], self.lora_B[name] = a, b
        self.lora_dropout[name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.scales[name] = config.scale_of(module_name)
        self.configs[name] = config
        self.train(self.training)

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter of this layer."""
        for by_name in (self.lora_A, self.lora_B, self.lora_dropout, self.scales, self.configs):
            del by_name[name]
        self.frozen -= {(name, "A"), (name, "B")}
        self.active = tuple(other for other in self.active if other != name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        if self.merged:
            return y
        for name in self.active:
            dtype = self.matrices(name)[0].dtype
            update = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x.to(dtype))))
            y = y + (self.scales[name] * update).to(y.dtype)
        return y

    @torch.no_grad()
    def merge(self) -> None:
        """Replace the base layer's weight by its sum with the active adapters; a tied weight elsewhere does not change.

        The sum is taken in float32 at least, whatever the weight's dtype.
        """
        if self.merged or not self.active:
            return
        weight = self._base_weight()
        total = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name in self.active:
            a, b = self.matrices(name)
            update = self.scales[name] * (b.to(total.dtype) @ a.to(total.dtype))
            total = total + (update.T if is_conv1d(self.base_layer) else update)
        self._unmerged.append(weight)
        self.base_layer.weight = nn.Parameter(total.to(weight.dtype), requires_grad=weight.requires_grad)

    def unmerge(self) -> None:
        """Restore the base layer's own weight, the same object with the same bits."""
        if self.merged:
            now, weight = self._base_weight(), self._unmerged.pop()
            weight.data = weight.data.to(device=now.device, dtype=now.dtype)  # the model may have moved while merged
            self.base_layer.weight = weight

    def follow_base(self) -> None:
        """Move the adapters to the base's device and into its training mode."""
        self.to(self._base_weight().device)
        self.train(self.base_layer.training)

    def activate(self, names: tuple[str, ...]) -> None:
        """Activate the adapters of `names` that this layer has; their matrices train unless frozen."""
        self.active = tuple(name for name in dict.fromkeys(names) if name in self.configs)
        for name in self.configs:
            for letter, weight in zip("AB", self.matrices(name), strict=True):
                weight.requires_grad_(name in self.active and (name, letter) not in self.frozen)

    def set_frozen(self, weights: Set[torch.Tensor], frozen: bool) -> None:
        """Remember which of its matrices are frozen, for later activations."""
        for name in self.configs:
            for letter, weight in zip("AB", self.matrices(name), strict=True):
                if weight in weights:
                    (self.frozen.add if frozen else self.frozen.discard)((name, letter))

    def matrices(self, name: str) -> Weights:
        """A [r, in] and B [out, r] of one adapter."""
        a, b = self.lora_A[name], self.lora_B[name]
        assert isinstance(a, nn.Linear) and isinstance(b, nn.Linear)
        return a.weight, b.weight

    def _base_weight(self) -> nn.Parameter:
        weight = self.base_layer.weight
        assert isinstance(weight, nn.Parameter)
        return weight


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D; does not import transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer, wrapped or not."""
    if isinstance(module, LoRALinear):
        return module.in_features, module.out_features
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    width, out = weight.shape if is_conv1d(module) else reversed(weight.shape)
    return width, out


def outer_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its dotted name as it was before LoRA: a wrapper counts as its layer, without its parts."""
    wrappers = [module for module in model.modules() if isinstance(module, LoRALinear)]
    parts = {part for wrapper in wrappers for part in wrapper.modules() if part is not wrapper}
    return {name: module for name, module in model.named_modules() if name and module not in parts}


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by its dotted name, wrapped or not."""
    return {
        name: module
        for name, module in outer_modules(model).items()
        if isinstance(module, LoRALinear | nn.Linear) or is_conv1d(module)
    }


def targeted_layers(model: nn.Module, config: LoRAConfig) -> dict[str, nn.Module]:
    """The linear layers that `config` adapts, by their dotted names."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name: layer
        for name, layer in linear_layers(model).items()
        if config.targets(name) and not (config.targets_all_linear and layer is head)
    }


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every wrapper by the dotted name of the layer it wraps; while LoRA is deactivated, those kept aside."""
    standing = {name: layer for name, layer in linear_layers(model).items() if isinstance(layer, LoRALinear)}
    aside: dict[str, LoRALinear] = getattr(model, ASIDE, {})
    return standing | aside


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the model's adapters, active or not."""
    return sorted({name for layer in lora_layers(model).values() for name in layer.configs})


def refuse_unknown(model: nn.Module, *names: str) -> None:
    """Raise ValueError for the first of `names` that no adapter of the model has."""
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise ValueError(f"the model has no adapter {name!r}; it has {', '.join(map(repr, known)) or 'none'}")


def apply_lora_to_model(model: Model, config: LoRAConfig, name: str = "default") -> Model:
    """Add a new adapter to every targeted linear layer of `model`, in place, and make it the active one.

    Only its parameters stay trainable. Layers that already have an adapter of that name keep it. Merged adapters are
    unmerged first, and deactivated LoRA is activated. Returns `model`.

    Raises:
        ValueError: no linear layer is targeted, `config.fan_in_fan_out` does not match a layer's weight, or torch
            rejects the name; the model is then unchanged.
    """
    targets = targeted_layers(model, config)
    if not targets:
        given = config.target_modules
        shown = repr(given) if isinstance(given, str) else list(given)
        raise ValueError(f"target_modules {shown} match no linear module of the model")
    for module_name, layer in targets.items():
        base = layer.base_layer if isinstance(layer, LoRALinear) else layer
        if config.fan_in_fan_out != is_conv1d(base):
            raise ValueError(
                f"fan_in_fan_out must be {is_conv1d(base)}: {module_name} is a {type(base).__name__}, "
                f"which stores its weight {'[in, out]' if is_conv1d(base) else '[out, in]'}"
            )
    add_adapter(model, name, config, dict.fromkeys(targets))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    activate_lora(model, name)
    return model


def add_adapter(model: nn.Module, name: str, config: LoRAConfig, weights: Mapping[str, Weights | None]) -> None:
    """Add an adapter, inactive, to the linear layers that `weights` names and that have none of that name.

    Raises:
        ValueError: torch rejects the name; the model is then unchanged.
    """
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise ValueError(
            f"adapter name {name!r} must not be empty, contain a dot or be an attribute of torch's modules"
        )
    unmerge_lora(model)
    _put_back(model)
    for module_name, given in weights.items():
        standing = model.get_submodule(module_name)
        wrapper = standing if isinstance(standing, LoRALinear) else LoRALinear(standing)
        if name not in wrapper.configs:
            wrapper.add_adapter(name, module_name, config, given)
        model.set_submodule(module_name, wrapper)


def activate_lora(model: nn.Module, *names: str) -> None:
    """Activate exactly these adapters, whose outputs add up; restores the wrappers if LoRA was deactivated.

    Of the LoRA parameters only theirs are then trainable, except frozen ones, as those loaded from files are until
    `unfreeze`. Merged adapters are unmerged first.

    Raises:
        ValueError: no name is given, or a name is unknown.
    """
    if not names:
        raise ValueError("activate_lora needs the name of at least one adapter")
    refuse_unknown(model, *names)
    unmerge_lora(model)
    _put_back(model)
    for layer in lora_layers(model).values():
        layer.activate(names)


def deactivate_lora(model: nn.Module) -> None:
    """Restore the model's original layers, the same objects; `activate_lora` restores the adapters.

    Merged adapters are unmerged first. Frozen parameters stay frozen. Does nothing if LoRA is not active.
    """
    unmerge_lora(model)
    wrapped = lora_layers(model)
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
    aside: dict[str, LoRALinear] = getattr(model, ASIDE, {})
    for module_name, layer in lora_layers(model).items():
        if name in layer.configs:
            layer.remove_adapter(name)
        if not layer.configs and aside.pop(module_name, None) is None:
            model.set_submodule(module_name, layer.base_layer)


def merge_lora(model: nn.Module) -> None:
    """Add the active adapters to the weights, so that the forward costs no more than without LoRA.

    A layer with active adapters gets a new weight; a weight tied to it (an embedding) does not change. Does nothing if
    adapters are already merged or LoRA is deactivated.
    """
    if not getattr(model, ASIDE, {}):
        for layer in lora_layers(model).values():
            layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`: restores the same weight tensors, bit for bit. Does nothing without a merge."""
    for layer in lora_layers(model).values():
        layer.unmerge()


def _put_back(model: nn.Module) -> None:
    """Undo `deactivate_lora`: puts the wrappers back, on the model's device and in its training mode."""
    aside: dict[str, LoRALinear] = getattr(model, ASIDE, {})
    for module_name, layer in aside.items():
        layer.follow_base()
        model.set_submodule(module_name, layer)
    aside.clear()

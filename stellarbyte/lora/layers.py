"""Layers with adapters, which stand in the places of a model's own layers.

Adapters have names. A `LoRALayer` adds low-rank changes to a layer; `TrainedCopies` replace it by a copy (PEFT's
modules_to_save).
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Set
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from stellarbyte.lora.config import LoRAConfig
from stellarbyte.lora.invocation import ActivatedTokens
from stellarbyte.lora.quantized_base import FrozenInt8Linear

_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class LowRank(NamedTuple):
    """The weights of an adapter in one layer."""

    a: torch.Tensor  # [r, in], or [r, in, height, width] of a convolution
    b: torch.Tensor  # [out, r], or [out, r, 1, 1]
    magnitude: torch.Tensor | None = None  # [out], with DoRA


class AdapterLayer(nn.Module, ABC):
    """A layer (`base_layer`) with adapters. `active` names those in use, in the order of addition.

    While merged, the forward is the base layer's alone; unmerge before any change of adapters.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.configs: dict[str, LoRAConfig] = {}
        self.frozen: set[tuple[str, str]] = set()  # adapter and parameter; the others train while active
        self.active: tuple[str, ...] = ()
        self._unmerged: dict[str, nn.Parameter] = {}  # the base's own parameters while merged; a dict: not registered
        self.train(base.training)

    @property
    def merged(self) -> bool:
        return bool(self._unmerged)

    @abstractmethod
    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        """The parameters of one adapter."""

    @abstractmethod
    def merged_parameters(self) -> dict[str, nn.Parameter]:
        """The base layer's parameters that the active adapters change, as changed."""

    def why_not_merged(self) -> str | None:
        """Why the active adapters cannot be merged, as the rest of a sentence about the layer; None: they can."""
        return None

    def remove_adapter(self, name: str) -> None:
        """Remove an adapter of this layer."""
        self.frozen -= {(name, key) for key in self.parameters_of(name)}
        self._remove(name)
        del self.configs[name]
        self.active = tuple(other for other in self.active if other != name)

    @abstractmethod
    def _remove(self, name: str) -> None:
        """Drop what `parameters_of` returns, and all else that belongs to the adapter."""

    @torch.no_grad()
    def merge(self) -> None:
        """Replace the base layer's parameters by those with the active adapters; a tied weight elsewhere stays."""
        if self.merged or not self.active:
            return
        for key, parameter in self.merged_parameters().items():
            self._unmerged[key] = self.base_layer.get_parameter(key)
            _set_parameter(self.base_layer, key, parameter)

    def unmerge(self) -> None:
        """Restore the base layer's own parameters, the same objects with the same bits."""
        for key, parameter in self._unmerged.items():
            now = self.base_layer.get_parameter(key)
            parameter.data = parameter.data.to(device=now.device, dtype=now.dtype)  # it may have moved while merged
            _set_parameter(self.base_layer, key, parameter)
        self._unmerged.clear()

    def follow_base(self) -> None:
        """Move the adapters to the base's device and into its training mode."""
        self.to(next(chain(self.base_layer.parameters(), self.base_layer.buffers())).device)
        self.train(self.base_layer.training)

    def activate(self, names: tuple[str, ...]) -> None:
        """Activate the adapters of `names` that this layer has; their parameters train unless frozen."""
        self.active = tuple(name for name in dict.fromkeys(names) if name in self.configs)
        for name in self.configs:
            for key, parameter in self.parameters_of(name).items():
                parameter.requires_grad_(name in self.active and (name, key) not in self.frozen)

    def set_frozen(self, parameters: Set[torch.Tensor], frozen: bool) -> None:
        """Remember which of its adapters' parameters are frozen, for later activations."""
        for name in self.configs:
            for key, parameter in self.parameters_of(name).items():
                if parameter in parameters:
                    (self.frozen.add if frozen else self.frozen.discard)((name, key))


class LoRALayer(AdapterLayer):
    """A layer plus, for every active adapter, scale · B act(A dropout(x)); without an activation, act(h) = h.

    With DoRA (Liu et al. 2024) the weight is m ⊙ (W + scale · B A) / ‖W + scale · B A‖ instead, by rows [out]; the norm
    gets no gradient (section 4.3). Of several active adapters, the changes of the weight add up.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.lora_A = nn.ModuleDict()
        self.lora_B = nn.ModuleDict()
        self.lora_dropout = nn.ModuleDict()
        self.lora_magnitude_vector = nn.ParameterDict()
        self.scales: dict[str, float] = {}
        self.tokens: ActivatedTokens | None = None  # of the model's current call, with an activated adapter

    def add_adapter(self, name: str, module_name: str, config: LoRAConfig, given: LowRank | None = None) -> None:
        """Add an adapter, inactive. Without `given` A is random and B zero, so the output does not change.

        New weights take the base's dtype. Given ones are copied, keep their dtype if it is wider, and are frozen.
        """
        base = weight_of(self.base_layer)
        dtype = base.dtype
        for weight in (given.a, given.b) if given is not None else ():
            dtype = torch.promote_types(dtype, weight.dtype)
        rank = config.rank_of(module_name) if given is None else len(given.a)
        a, b = self._new_matrices(rank, base.device, dtype)
        with torch.no_grad():
            if given is None:
                nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
                nn.init.zeros_(b.weight)
            else:
                a.weight.copy_(given.a)
                b.weight.copy_(given.b)
        self.lora_A[name], self.lora_B[name] = a, b
        self.lora_dropout[name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.scales[name] = config.scale_of(module_name)
        self.configs[name] = config
        if config.use_dora:
            magnitude = self._row_norms(name) if given is None or given.magnitude is None else given.magnitude
            self.lora_magnitude_vector[name] = nn.Parameter(magnitude.to(base.device, dtype, copy=True))
        if given is not None:
            self.frozen |= {(name, key) for key in self.parameters_of(name)}
        self.train(self.training)

    @abstractmethod
    def _new_matrices(
        self, rank: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d]:
        """Modules that multiply by A and by B, with weights of any values."""

    def _remove(self, name: str) -> None:
        for by_name in (self.lora_A, self.lora_B, self.lora_dropout, self.scales):
            del by_name[name]
        if name in self.lora_magnitude_vector:
            del self.lora_magnitude_vector[name]

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        found = {"lora_A": self.lora_A[name].weight, "lora_B": self.lora_B[name].weight}
        if name in self.lora_magnitude_vector:
            found["lora_magnitude_vector"] = self.lora_magnitude_vector[name]
        return found  # type: ignore[return-value]  # torch declares attributes of modules as Tensor | Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = y = self.base_layer(x)
        if self.merged:
            return y
        for name in self.active:
            y = y + self._change(name, x, product).to(y.dtype)
        return y

    def _change(self, name: str, x: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
        """What an adapter adds to the base layer's output for x."""
        hidden = self.lora_A[name](self.lora_dropout[name](x.to(self.parameters_of(name)["lora_A"].dtype)))
        activation = self.configs[name].activation
        update = self.lora_B[name](hidden if activation is None else _ACTIVATIONS[activation](hidden))
        update = self.scales[name] * update
        if self.tokens is not None and (invocation := self.configs[name].alora_invocation_tokens) is not None:
            is_activated = self.tokens.of(tuple(invocation)).reshape(*update.shape[:-1], 1)
            return torch.where(is_activated, update, 0.0)
        if name not in self.lora_magnitude_vector:
            return update
        factors, bias = self._row_factors(name), self.base_layer.bias
        assert bias is None or isinstance(bias, torch.Tensor)
        return (factors - 1) * (product if bias is None else product - bias) + factors * update

    def _delta(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """scale · B A in the shape of `weight_of`."""
        a, b = (self.parameters_of(name)[key].to(dtype) for key in ("lora_A", "lora_B"))
        return (self.scales[name] * (b.flatten(1) @ a.flatten(1))).view(len(b), *a.shape[1:])

    def _row_norms(self, name: str) -> torch.Tensor:
        """[out] ‖W + scale · B A‖ by rows, without gradient, in float32 at least."""
        with torch.no_grad():
            weight = _widened(weight_of(self.base_layer))
            return torch.linalg.vector_norm(weight + self._delta(name, weight.dtype), dim=1)

    def _row_factors(self, name: str) -> torch.Tensor:
        """[out] m / ‖W + scale · B A‖."""
        return self.lora_magnitude_vector[name] / self._row_norms(name)

    def why_not_merged(self) -> str | None:
        for name in self.active:
            if (activation := self.configs[name].activation) is not None:
                return f"adapter {name!r} has the activation {activation!r}: non-linear adapters cannot be merged"
            if self.configs[name].alora_invocation_tokens is not None:
                return f"adapter {name!r} is activated by alora_invocation_tokens: other tokens need the weight alone"
        if self.active and isinstance(self.base_layer, FrozenInt8Linear):
            return "its weight is quantized; merge into the model before quantize_frozen"
        return None

    def merged_parameters(self) -> dict[str, nn.Parameter]:
        """The sum is taken in float32 at least, whatever the weight's dtype."""
        own = self.base_layer.get_parameter("weight")
        weight = total = _widened(weight_of(self.base_layer))
        for name in self.active:
            changed = weight + self._delta(name, weight.dtype)
            if name in self.lora_magnitude_vector:
                changed = changed * self._row_factors(name).to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))
            total = total + (changed - weight)
        total = total.T if is_conv1d(self.base_layer) else total
        return {"weight": nn.Parameter(total.to(own.dtype).contiguous(), requires_grad=own.requires_grad)}


class LoRALinear(LoRALayer):
    """Of an nn.Linear, a `FrozenInt8Linear`, or a Conv1D of transformers (weights [in, out])."""

    def _new_matrices(self, rank: int, device: torch.device, dtype: torch.dtype) -> tuple[nn.Linear, nn.Linear]:
        out, width = weight_shape(self.base_layer)
        a = nn.Linear(width, rank, bias=False, device=device, dtype=dtype)
        return a, nn.Linear(rank, out, bias=False, device=device, dtype=dtype)


class LoRAConv2d(LoRALayer):
    """Of an nn.Conv2d with one group: A is a convolution as the layer's, B one of 1 × 1."""

    def _new_matrices(self, rank: int, device: torch.device, dtype: torch.dtype) -> tuple[nn.Conv2d, nn.Conv2d]:
        base = self.base_layer
        assert isinstance(base, nn.Conv2d)
        a = nn.Conv2d(
            base.in_channels,
            rank,
            base.kernel_size,  # type: ignore[arg-type]  # torch declares tuples of any length
            base.stride,  # type: ignore[arg-type]
            base.padding,  # type: ignore[arg-type]
            base.dilation,  # type: ignore[arg-type]
            bias=False,
            padding_mode=base.padding_mode,
            device=device,
            dtype=dtype,
        )
        return a, nn.Conv2d(rank, base.out_channels, 1, bias=False, device=device, dtype=dtype)


class TrainedCopies(AdapterLayer):
    """A module in the place of which each adapter has a whole copy; at most one is active."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.modules_to_save = nn.ModuleDict()

    def add_copy(self, name: str, config: LoRAConfig, given: Mapping[str, torch.Tensor] | None = None) -> None:
        """Add an adapter's copy, inactive; of the base module, or with the given parameters, which are frozen."""
        new = copy.deepcopy(self.base_layer)
        if given is not None:
            with torch.no_grad():
                for key, parameter in new.named_parameters():
                    parameter.copy_(given[key])
            self.frozen |= {(name, key) for key, _ in new.named_parameters()}
        self.modules_to_save[name] = new
        self.configs[name] = config
        self.train(self.training)

    def _remove(self, name: str) -> None:
        del self.modules_to_save[name]

    def parameters_of(self, name: str) -> dict[str, nn.Parameter]:
        return dict(self.modules_to_save[name].named_parameters())

    def forward(self, *arguments: object, **options: object) -> object:
        used = self.base_layer if self.merged or not self.active else self.modules_to_save[self.active[0]]
        return used(*arguments, **options)

    def merged_parameters(self) -> dict[str, nn.Parameter]:
        copied = self.parameters_of(self.active[0])
        return {key: nn.Parameter(own.detach().clone(), requires_grad=False) for key, own in copied.items()}


def _widened(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def _set_parameter(module: nn.Module, key: str, parameter: nn.Parameter) -> None:
    owner, _, name = key.rpartition(".")
    setattr(module.get_submodule(owner), name, parameter)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' Conv1D; does not import transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def is_adaptable(module: nn.Module) -> bool:
    """Whether a layer, wrapped or not, can have low-rank adapters."""
    return isinstance(module, LoRALayer | nn.Linear | nn.Conv2d | FrozenInt8Linear) or is_conv1d(module)


def weight_of(layer: nn.Module) -> torch.Tensor:
    """[out, in], or [out, in, height, width]: the weight that an unwrapped layer multiplies by."""
    if isinstance(layer, FrozenInt8Linear):
        return layer.dequantized()
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    return weight.T if is_conv1d(layer) else weight


def weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """The shape of `weight_of` for a layer, wrapped or not."""
    base = layer.base_layer if isinstance(layer, LoRALayer) else layer
    if isinstance(base, FrozenInt8Linear):
        return base.out_features, base.in_features
    assert isinstance(base, nn.Module)
    return tuple(weight_of(base).shape)

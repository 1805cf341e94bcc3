"""The parameters of a model by part, counted from its configuration."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from stellarbyte.checkpoint.shapes import expected_shapes
from stellarbyte.config import ByteModelConfig
from stellarbyte.model.parts import Part, Shape, layer_parts, module_path, parameter_shapes

# In the order of a model. A tied head has no parameters of its own.
GROUPS = (*("embedding", "attention", "mlp", "experts", "shared_experts", "router", "norms", "scales", "head"),)
_OUTSIDE_LAYERS = {
    "model.embed_tokens.weight": "embedding",
    "model.norm.weight": "norms",
    "model.rotary.raw_decay": "scales",
    "lm_head.weight": "head",
}
_PREFIXES = {  # the first that matches
    "self_attn.": "attention",
    "mlp.experts.": "experts",
    "mlp.shared_expert": "shared_experts",
    "mlp.gate.": "router",
    "mlp.": "mlp",
}
_KINDS = {"norm": "norms", "scale": "scales"}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One tensor of a checkpoint.

    Attributes:
        name: in the checkpoint.
        layer: its layer; None: outside the layers.
        part: its name within the layer; outside the layers its whole name.
        group: one of GROUPS.
        is_matrix: a matrix, or a stack of one for each expert; not a vector, nor a stack of vectors.
    """

    name: str
    layer: int | None
    part: str
    group: str
    shape: Shape
    is_matrix: bool

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Count:
    """The parameters of one part in all layers, or of one group. `shapes`: the different ones, in the layers' order."""

    name: str
    group: str
    num_tensors: int
    num_parameters: int
    share: float  # of the model's parameters
    shapes: tuple[Shape, ...]


def parameters_of(config: ByteModelConfig) -> list[Parameter]:
    """Every tensor of a checkpoint, in the model's own order."""
    in_layers = {
        module_path(layer, name): (layer, name, _group(part))
        for layer in range(config.num_hidden_layers)
        for part in layer_parts(config, layer)
        for name in parameter_shapes(part, config, layer)
    }
    found = []
    for name, shape in expected_shapes(config).items():
        layer, part, group = in_layers[name] if name in in_layers else (None, name, _OUTSIDE_LAYERS[name])
        is_matrix = len(shape) > 1 and not part.endswith("bias")
        found.append(Parameter(name=name, layer=layer, part=part, group=group, shape=shape, is_matrix=is_matrix))
    return found


def count_parts(parameters: Iterable[Parameter]) -> list[Count]:
    """By part, in the order of first occurrence."""
    return _counted(parameters, lambda parameter: parameter.part)


def count_groups(parameters: Iterable[Parameter]) -> list[Count]:
    """By group, in the order of GROUPS; without those that the model lacks."""
    counts = _counted(parameters, lambda parameter: parameter.group)
    return sorted(counts, key=lambda count: GROUPS.index(count.name))


def _group(part: Part) -> str:
    if part.kind in _KINDS:
        return _KINDS[part.kind]
    return next(group for prefix, group in _PREFIXES.items() if part.name.startswith(prefix))


def _counted(parameters: Iterable[Parameter], key: Callable[[Parameter], str]) -> list[Count]:
    together: dict[str, list[Parameter]] = {}
    for parameter in parameters:
        together.setdefault(key(parameter), []).append(parameter)
    numbers = {name: sum(one.num_elements for one in of_name) for name, of_name in together.items()}
    total = sum(numbers.values())
    return [
        Count(
            name=name,
            group=of_name[0].group,
            num_tensors=len(of_name),
            num_parameters=numbers[name],
            share=numbers[name] / total,
            shapes=tuple(dict.fromkeys(one.shape for one in of_name)),
        )
        for name, of_name in together.items()
    ]

"""The kinds of layers that a model consists of."""

from dataclasses import dataclass

from stellarbyte.config import ByteModelConfig


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """Layers that are built alike.

    Attributes:
        layers: their numbers, ascending.
        window: in tokens; None: they see the whole sequence.
        rotation: as in `ByteModelConfig.rotations`.
        has_experts: in the place of the MLP.
        holders: for each layer the one whose experts it uses; (): it has none.
    """

    layers: tuple[int, ...]
    window: int | None
    rotation: str
    has_experts: bool
    holders: tuple[int, ...]

    @property
    def num_pools(self) -> int:
        """Different sets of experts."""
        return len(set(self.holders))


def layer_kinds(config: ByteModelConfig) -> list[LayerKind]:
    """In the order of first occurrence; together they are all layers."""
    together: dict[tuple[int | None, str, bool], list[int]] = {}
    for layer, holder in enumerate(config.expert_layers):
        together.setdefault((config.windows[layer], config.rotations[layer], holder is not None), []).append(layer)
    kinds = []
    for (window, rotation, has_experts), layers in together.items():
        holders = tuple(holder for layer in layers if (holder := config.expert_layers[layer]) is not None)
        kinds.append(
            LayerKind(layers=tuple(layers), window=window, rotation=rotation, has_experts=has_experts, holders=holders)
        )
    return kinds

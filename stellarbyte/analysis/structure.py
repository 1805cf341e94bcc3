"""The kinds of layers that a model consists of."""

from collections.abc import Sequence
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


def layer_runs(layers: Sequence[int]) -> list[str]:
    """Runs of ascending numbers of layers, such as "0–3" and "5"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]

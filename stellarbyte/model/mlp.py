"""The gated feed-forward part of a layer (Shazeer 2020)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.attention import Project
from stellarbyte.model.building import add_parts

GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


@dataclass(frozen=True, kw_only=True)
class ClampedSwiglu:
    """(up + 1) · gate · sigmoid(alpha · gate), the gate at most `limit`, up within ±limit: as experts of gpt-oss."""

    alpha: float
    limit: float

    @classmethod
    def of(cls, config: ByteModelConfig) -> "ClampedSwiglu | None":
        """None: the config's experts multiply act(gate) · up."""
        if config.swiglu_alpha is None or config.swiglu_limit is None:
            return None
        return cls(alpha=config.swiglu_alpha, limit=config.swiglu_limit)

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * (gate * torch.sigmoid(self.alpha * gate))


class ByteMLP(nn.Module):
    """down(act(gate(x)) · up(x)) over the last dimension.

    Args:
        name: in the layer; "mlp", or "mlp.shared_expert" of a mixture of experts.
    """

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def __init__(self, config: ByteModelConfig, layer: int, name: str = "mlp") -> None:
        super().__init__()
        add_parts(self, name, config, layer)
        self.activation = GATES[config.hidden_act]

    def forward(self, x: torch.Tensor, project: Project) -> torch.Tensor:
        gate, up = project(x, self.gate_proj, self.up_proj)
        (out,) = project(self.activation(gate) * up, self.down_proj)
        return out

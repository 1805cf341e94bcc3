"""A mixture of experts in the place of a layer's MLP."""

import torch
from torch import nn

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.attention import Project
from stellarbyte.model.building import add_parts
from stellarbyte.model.mlp import ByteMLP
from stellarbyte.model.moe.dispatch import dispatch, within_capacity
from stellarbyte.model.moe.experts import ByteExperts
from stellarbyte.model.moe.losses import RouterLog, RouterSums, router_sums
from stellarbyte.model.moe.router import ByteRouter

# ... any leading dimensions, T their product, C hidden size


class ByteMoE(nn.Module):
    """Σ gate · expert(x) over the experts that the router chose, plus the shared expert's output if there is one."""

    shared_expert_gate: nn.Linear | None

    def __init__(self, config: ByteModelConfig, layer: int) -> None:
        super().__init__()
        self.capacity_factor = config.capacity_factor
        self.gate = ByteRouter(config, layer)
        self.experts = ByteExperts(config, layer) if config.expert_layers[layer] == layer else None
        self._holder: list[ByteMoE] = []  # of the experts, if not this layer; in a list: no submodule of this one
        has_shared = config.shared_expert_intermediate_size > 0
        self.shared_expert = ByteMLP(config, layer, "mlp.shared_expert") if has_shared else None
        add_parts(self, "mlp", config, layer)

    def use_experts_of(self, holder: "ByteMoE") -> None:
        """Compute with the experts that another layer of the pool holds."""
        self._holder = [holder]

    def forward(
        self, x: torch.Tensor, project: Project, log: RouterLog | None = None
    ) -> tuple[torch.Tensor, RouterSums | None]:
        """x [..., C] → the same shape, and the sums for the log if there is one. Does not write to the log, so that a
        recomputed layer counts once."""
        x_TC = x.reshape(-1, x.shape[-1])
        routing = self.gate(x_TC)
        is_token_T = None if log is None else log.is_token_T
        sums = None if log is None else router_sums(routing, is_token_T)
        if self.training and self.capacity_factor is not None:
            routing = within_capacity(routing, self.capacity_factor, is_token_T)
        experts = self._holder[0].experts if self._holder else self.experts
        assert experts is not None, "use_experts_of was not called"
        out = dispatch(x_TC, routing, experts).view_as(x)
        if self.shared_expert is not None:
            shared = self.shared_expert(x, project)
            out = out + (shared if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * shared)
        return out, sums

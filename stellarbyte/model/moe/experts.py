"""The experts of a layer, as stacks of matrices."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.building import add_parts
from stellarbyte.model.mlp import GATES, ClampedSwiglu
from stellarbyte.model.moe.products import grouped_linear, takes_grouped
from stellarbyte.model.residual import deepnorm_beta

# N rows sorted by expert, E experts, C hidden size, I inner size of an expert, O outputs


class ByteExperts(nn.Module):
    """down(act(gate(x)) · up(x)) of each row by its own expert; gates lie above ups in `gate_up_proj`.

    With `swiglu_limit`, a `ClampedSwiglu` is in the place of act(gate) · up.
    """

    gate_up_proj: nn.Parameter  # [E, 2 I, C]
    gate_up_proj_bias: nn.Parameter | None  # [E, 2 I]
    down_proj: nn.Parameter  # [E, C, I]
    down_proj_bias: nn.Parameter | None  # [E, C]

    def __init__(self, config: ByteModelConfig, layer: int) -> None:
        super().__init__()
        self.num_experts = config.num_experts
        self.activation = GATES[config.hidden_act]
        self.swiglu = ClampedSwiglu.of(config)
        self.init_gain = deepnorm_beta(config)  # read by `_init_weights`
        add_parts(self, "mlp.experts", config, layer)

    def forward(self, x_NC: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
        """[N, C]; the first counts_E[0] rows belong to expert 0, the next counts_E[1] to expert 1, and so on."""
        in_one_kernel = takes_grouped(x_NC, self.gate_up_proj, self.down_proj)
        product = partial(
            grouped_linear, counts_E=counts_E if in_one_kernel else counts_E.cpu(), in_one_kernel=in_one_kernel
        )
        gate_up = _biased(product(x_NC, self.gate_up_proj), self.gate_up_proj_bias, counts_E)
        return _biased(product(self._gated(gate_up), self.down_proj), self.down_proj_bias, counts_E)

    def inner(self, x_NC: torch.Tensor, expert: int) -> torch.Tensor:
        """[N, I]: what the down matrix of one expert reads."""
        bias = None if self.gate_up_proj_bias is None else self.gate_up_proj_bias[expert]
        return self._gated(F.linear(x_NC, self.gate_up_proj[expert], bias))

    def _gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[N, 2 I] → [N, I]"""
        gate_NI, up_NI = gate_up.chunk(2, dim=-1)
        return self.activation(gate_NI) * up_NI if self.swiglu is None else self.swiglu(gate_NI, up_NI)


def _biased(x_NO: torch.Tensor, bias_EO: torch.Tensor | None, counts_E: torch.Tensor) -> torch.Tensor:
    """x plus the bias of each row's expert."""
    if bias_EO is None:
        return x_NO
    return x_NO + bias_EO.repeat_interleave(counts_E, dim=0, output_size=len(x_NO)).to(x_NO.dtype)

"""The experts of a layer, as stacks of matrices."""

import torch
from torch import nn
from torch.nn import functional as F

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.building import add_parts
from stellarbyte.model.mlp import GATES, ClampedSwiglu
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
        gate_up = _biased(grouped_linear(x_NC, self.gate_up_proj, counts_E), self.gate_up_proj_bias, counts_E)
        return _biased(grouped_linear(self._gated(gate_up), self.down_proj, counts_E), self.down_proj_bias, counts_E)

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


def grouped_linear(x_NK: torch.Tensor, weight_EOK: torch.Tensor, counts_E: torch.Tensor) -> torch.Tensor:
    """[N, O] = x · weight[expert of the row]ᵀ: one kernel where the device has one, or a loop over the experts."""
    if takes_grouped(x_NK, weight_EOK):
        ends_E = counts_E.cumsum(0).to(torch.int32)
        return F.grouped_mm(x_NK.bfloat16(), weight_EOK.bfloat16().transpose(1, 2), offs=ends_E)
    # `unbind` gives the stack one gradient; indexing would add up one of its size for each expert.
    rows, matrices = x_NK.split(counts_E.tolist()), weight_EOK.unbind()
    return torch.cat([F.linear(own_NK, matrix_OK) for own_NK, matrix_OK in zip(rows, matrices, strict=True)])


def takes_grouped(x_NK: torch.Tensor, weight_EOK: torch.Tensor) -> bool:
    """Whether `F.grouped_mm` computes this product: bfloat16, by autocast as well, on a CUDA device, rows of a multiple
    of 16 bytes."""
    is_aligned = weight_EOK.shape[1] % 8 == 0 and weight_EOK.shape[2] % 8 == 0
    return x_NK.is_cuda and _in_bfloat16(x_NK, weight_EOK) and is_aligned and hasattr(F, "grouped_mm")


def _in_bfloat16(x_NK: torch.Tensor, weight_EOK: torch.Tensor) -> bool:
    """Whether `F.linear` would compute this product in bfloat16; autocast does not know `F.grouped_mm`."""
    device = x_NK.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) == torch.bfloat16
    return x_NK.dtype == weight_EOK.dtype == torch.bfloat16

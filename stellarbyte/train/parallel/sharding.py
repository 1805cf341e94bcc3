"""Models whose parameters are divided among ranks: made, gathered, filled, and their gradients clipped.

FSDP2 (torch's `fully_shard`) divides the parameters of each decoder layer, gathers them for its forward and backward
pass, and reduces their gradients. accelerate's own FSDP is not used: it knows neither layers that are divided by tensor
parallelism nor pools of experts.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm

from stellarbyte.model.moe.layer import ByteMoE
from stellarbyte.model.transformer import ByteTransformer
from stellarbyte.train.parallel.layout import Layout
from stellarbyte.train.parallel.tensor import divide_layers
from stellarbyte.train.ranks import is_first_rank


def shard(model: ByteTransformer, layout: Layout, device: torch.device) -> None:
    """Divide a model that is alike on all ranks, in place, and move the parts to the device.

    Parameters become DTensors. Biases that `balance_experts` moves have no gradient and stay whole on every rank.
    """
    mesh = init_device_mesh(
        device.type, (layout.replicas, layout.fsdp, layout.tensor), mesh_dim_names=("replicas", "fsdp", "tensor")
    )
    if layout.tensor > 1:
        divide_layers(model, mesh["tensor"])
    data_mesh: DeviceMesh = mesh["replicas", "fsdp"] if layout.replicas > 1 else mesh["fsdp"]
    kept = {p for name, p in model.named_parameters() if name.endswith(".e_score_correction_bias")}
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    options: dict[str, Any] = {"mesh": data_mesh, "ignored_params": kept}
    for layer in model.model.layers:
        if isinstance(layer.mlp, ByteMoE) and layer.mlp.experts is not None and model.config.expert_pools is not None:
            fully_shard(layer.mlp.experts, **options)  # other layers of the pool call them without this one
        fully_shard(layer, **options)
    fully_shard(model, **options)


class ShardedModel(nn.Module):
    """What the Trainer calls instead of DistributedDataParallel: forward in the run's precision.

    Every batch reduces its gradients within a copy, so that no rank ever holds all of them; only the sum over copies
    waits for the last batch of a step (`no_sync`).
    """

    def __init__(self, module: nn.Module, precision: torch.dtype | None) -> None:
        super().__init__()
        self.module = module
        self.precision = precision

    def forward(self, **inputs: Any) -> Any:
        device_type = inputs["input_ids"].device.type
        with torch.autocast(device_type, self.precision, enabled=self.precision is not None):
            return self.module(**inputs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_all_reduce(False)
        try:
            yield
        finally:
            self.module.set_requires_all_reduce(True)


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def release_gathered(model: nn.Module) -> None:
    """Drop the whole parameters that a forward without a backward pass has left; unsharded models: nothing."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part, sharing its memory; a tensor that is not divided is its own part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def mesh_of(tensor: torch.Tensor) -> DeviceMesh | None:
    """The ranks that hold a DTensor; torch computes with several at once only if they have one mesh."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def gathered(tree: Any) -> Any:
    """Nested dictionaries and lists with their tensors whole, on the CPU of the first rank; None on the others.

    Every rank must call it with the same tree. Tensors that are not divided are passed on.
    """
    if isinstance(tree, DTensor):
        whole = tree.full_tensor()
        return whole.cpu() if is_first_rank() else None
    if isinstance(tree, Mapping):
        return {key: gathered(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [gathered(value) for value in tree]
    return tree


def gathered_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The whole state of a sharded model, as `gathered`; tied parameters share one tensor."""
    state = model.state_dict(keep_vars=True)  # copies of the tensors would not show which are tied
    distinct = gathered({id(tensor): tensor for tensor in state.values()})
    return {name: distinct[id(tensor)] for name, tensor in state.items()}


def part_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Of a whole tensor, what this rank holds of `like`; as a DTensor if that is one."""
    if not isinstance(like, DTensor):
        return whole
    # None: every rank has the whole. A copy, since a part of it would keep it in memory.
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None).clone()


@torch.no_grad()
def fill(parameter: torch.Tensor, whole: torch.Tensor) -> None:
    """Set a parameter, divided or not, from a whole tensor."""
    local(parameter).copy_(local(part_like(whole, parameter)))


def optimizer_part(whole: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """From an optimizer's gathered `state_dict` the one of this rank, for its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return whole
    state = {
        number: {
            name: part_like(value, parameters[number]) if value.dim() else value for name, value in entries.items()
        }
        for number, entries in whole["state"].items()
    }
    return {**whole, "state": state}


def gradient_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Of all gradients of all ranks as one vector; a number that several ranks hold counts once."""
    by_mesh = defaultdict(list)
    for gradient in gradients:
        by_mesh[mesh_of(gradient)].append(gradient)
    norms = [get_total_norm(group) for group in by_mesh.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack(whole))


def gradients_of(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@torch.no_grad()
def clip_gradients(gradients: Sequence[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Scale the gradients down to `max_norm`, as `torch.nn.utils.clip_grad_norm_`; returns the norm that they had."""
    norm = gradient_norm(gradients)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
    return norm

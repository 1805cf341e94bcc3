"""Tensor parallelism: the layers of a model divided among ranks, as the table of their parts says.

A linear that is cut along its outputs reads the whole input and gives the rank its own heads or channels; the linear
after it is cut along its inputs, and its output is summed over the ranks (Shoeybi et al. 2019, "Megatron-LM"). Parts
without a cut, embeddings and the head are computed by every rank.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.tensor.parallel.style import ParallelStyle

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.parts import layer_parts, module_path
from stellarbyte.model.transformer import ByteTransformer

_HEADS = 2  # dimension of queries and keys [B, T, heads, D]


def tensor_plan(config: ByteModelConfig) -> dict[str, ParallelStyle]:
    """The style of every divided module, by its full name."""
    plan: dict[str, ParallelStyle] = {}
    for layer in range(config.num_hidden_layers):
        for part in layer_parts(config, layer):
            name = module_path(layer, part.name)
            if part.kind == "linear" and part.cut is not None:
                plan[name] = ColwiseParallel() if part.cut == "out" else RowwiseParallel()
            elif part.reads_heads:  # every rank has the weight; its gradient is the sum over all heads
                plan[name] = SequenceParallel(sequence_dim=_HEADS, use_local_output=True)
    return plan


def divide_layers(model: ByteTransformer, mesh: DeviceMesh) -> None:
    """Replace the divided parameters by DTensors on `mesh`, which has one dimension. All ranks have equal weights."""
    parallelize_module(model, mesh, tensor_plan(model.config))
    for layer in range(model.config.num_hidden_layers):
        for part in layer_parts(model.config, layer):
            if part.kind == "parameter" and part.cut == "out":
                path, _, name = module_path(layer, part.name).rpartition(".")
                owner = model.get_submodule(path)
                whole = getattr(owner, name)
                divided = distribute_tensor(whole.detach(), mesh, [Shard(0)])
                owner.register_parameter(name, nn.Parameter(divided, requires_grad=whole.requires_grad))

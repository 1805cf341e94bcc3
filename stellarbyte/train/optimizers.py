"""AdamW, and Muon for matrices with AdamW for everything else."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from stellarbyte.train.config.run import Train
from stellarbyte.train.errors import TrainError
from stellarbyte.train.parallel.sharding import mesh_of

Groups = dict[str, list[nn.Parameter]]


def make_optimizer(model: nn.Module, settings: Train) -> torch.optim.Optimizer:
    """The optimizer of the trainable parameters.

    Raises:
        TrainError: Muon, for a model whose layers hold stacks of matrices (mixtures of experts).
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = parameter_groups(model, uses_muon=settings.optimizer == "muon")
    adamw_groups = [
        {"params": groups["decayed"], "weight_decay": settings.weight_decay},
        {"params": groups["kept"], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(
        [group for group in adamw_groups if group["params"]] or [{"params": []}],
        lr=settings.lr,
        betas=(0.9, settings.beta2),
        fused=(all(p.is_cuda for p in trained) and len({mesh_of(p) for p in trained}) < 2) or None,
    )
    if settings.optimizer == "adamw":
        return adamw
    # Its updates have the size of AdamW's, so that both take one learning rate (Liu et al. 2025, "Muon is scalable").
    muon = torch.optim.Muon(
        groups["orthogonal"], lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return TwoOptimizers(muon, adamw)


def parameter_groups(model: nn.Module, *, uses_muon: bool) -> Groups:
    """The trainable parameters, each in one group: "orthogonal" for Muon (weights of linears within layers), and for
    AdamW "decayed" (the other matrices) and "kept" (norms, biases, factors)."""
    layers = {id(p) for name, p in model.named_parameters() if ".layers." in name}
    linears = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    groups: Groups = {"orthogonal": [], "decayed": [], "kept": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if uses_muon and parameter.dim() > 2:
            raise TrainError(f"train.optimizer muon is for matrices, but {name} is a stack of them; use adamw.")
        if uses_muon and id(parameter) in layers & linears:
            groups["orthogonal"].append(parameter)
        else:
            groups["decayed" if parameter.dim() > 1 else "kept"].append(parameter)
    return groups


class TwoOptimizers(torch.optim.Optimizer):
    """Steps two optimizers as one; its groups are theirs, so a schedule reaches both."""

    def __init__(self, first: torch.optim.Optimizer, second: torch.optim.Optimizer) -> None:
        self.optimizers = (first, second)
        super().__init__([*first.param_groups, *second.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("closure is not supported")
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self._share_groups()

"""Stops a run before a step with numbers that are not finite; keeps the weights and the batch that led to it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from stellarbyte.train.errors import TrainError
from stellarbyte.train.parallel.sharding import gathered, gradient_norm, gradients_of, local
from stellarbyte.train.ranks import any_rank, is_first_rank


class Divergence(TrainerCallback):
    """Checks losses and gradients before every step of the optimizer.

    Args:
        folder: of the run; diverged-STEP in it gets the weights of before the step and each rank's batches.

    Raises:
        TrainError: a loss or a gradient is not finite; the weights are those of the step before.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._batches: list[Mapping[str, torch.Tensor]] = []
        self._losses: list[torch.Tensor] = []

    def remember(self, batch: Mapping[str, Any], loss: torch.Tensor) -> None:
        """One of the batches of this step, and its share of the loss."""
        self._batches.append(batch)
        self._losses.append(loss)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        gradients = gradients_of(model)
        parts = [local(gradient) for gradient in gradients]
        numbers = torch.stack([*torch._foreach_norm(parts), *(loss.float().reshape(()) for loss in self._losses)])
        if any_rank(not bool(numbers.isfinite().all()), args.device):
            raise self._error(args, state, model, gradients)
        self._batches.clear()
        self._losses.clear()

    def _error(self, args: Any, state: Any, model: nn.Module, gradients: list[torch.Tensor]) -> TrainError:
        step = state.global_step + 1
        folder = self.folder / f"diverged-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        batches = {
            f"{number}.{name}": tensor.cpu().contiguous()
            for number, batch in enumerate(self._batches)
            for name, tensor in batch.items()
        }
        save_file(batches, folder / f"batches-rank-{args.process_index}.safetensors")
        weights = gathered({name: p.detach() for name, p in model.named_parameters()})
        if is_first_rank():
            tensors = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
            save_file(tensors, folder / "weights.safetensors")
        loss = float(sum(loss.float().cpu() for loss in self._losses))
        norm = float(gradient_norm(gradients))
        return TrainError(
            f"Step {step} would not be finite (loss {loss:g}, gradient norm {norm:g}); "
            f"the weights of step {step - 1} and the batches are in {folder}."
        )

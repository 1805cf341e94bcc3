"""An exponential moving average of the trained weights (Polyak & Juditsky 1992), in float32."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from stellarbyte.train.errors import TrainError
from stellarbyte.train.parallel.sharding import fill, gathered, local
from stellarbyte.train.ranks import is_first_rank

EMA_FILE = "ema.safetensors"


class Ema(TrainerCallback):
    """After every step: average ← decay · average + (1 - decay) · weight, from the weights at the start.

    Args:
        model: whose trainable parameters are averaged; of a sharded one, each rank averages its parts.
        decay: between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {name: p.detach().float().clone() for name, p in trained.items()}
        self._weights = trained

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The Trainer has moved the model to its device."""
        self.averages = {name: average.to(self._weights[name].device) for name, average in self.averages.items()}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        averages = [local(average) for average in self.averages.values()]
        weights = [local(weight.detach()).float() for weight in self._weights.values()]
        torch._foreach_lerp_(averages, weights, 1 - self.decay)

    def save(self, folder: Path) -> None:
        """Write the averages into a checkpoint; every rank must call it."""
        whole = gathered(self.averages)
        if is_first_rank():
            save_file({name: average.cpu() for name, average in whole.items()}, folder / EMA_FILE)

    def load(self, folder: Path) -> None:
        """Continue with the averages of a checkpoint.

        Raises:
            TrainError: it has none, or those of another model.
        """
        if not (folder / EMA_FILE).is_file():
            raise TrainError(f"{folder.name} has no averages ({EMA_FILE}): it was made without train.ema.")
        found = load_file(folder / EMA_FILE)
        for name, average in self.averages.items():
            if name not in found or found[name].shape != average.shape:
                raise TrainError(f"{folder.name} has no average of {name}.")
            fill(average, found[name])

    @torch.no_grad()
    def put_into_model(self) -> None:
        """Replace the model's weights by their averages."""
        for name, weight in self._weights.items():
            local(weight).copy_(local(self.averages[name]))

"""How a training that shares its GPU with a server leaves time to the server's requests.

A GPU gives processes turns of equal length, whatever their priorities on the CPU are. So while requests run, the
training rests after each layer, forward and backward, in proportion to the time that the layer took.
"""

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from stellarbyte.model.decoder import ByteDecoderLayer

BUSY_SHARE = 0.2  # of the time in which the training computes; requests get half of that, too


class Pace(TrainerCallback):
    """Attributes:
    idle: set while the server has no requests; another thread sets and clears it.

    `synchronize` returns once the device has computed all that it was given.
    """

    def __init__(
        self,
        idle: threading.Event,
        synchronize: Callable[[], None] = torch.cuda.synchronize,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.idle = idle
        self._synchronize = synchronize
        self._clock = clock
        self._began_s: float | None = None  # what is computed now; None: not known

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        for layer in model.modules():
            if isinstance(layer, ByteDecoderLayer):
                layer.register_forward_hook(self._after_layer)

    def rest(self) -> None:
        """Wait in proportion to the time since the last rest; the server's becoming idle ends it."""
        if self.idle.is_set():
            self._began_s = None
            return
        self._synchronize()
        if self._began_s is not None:
            self.idle.wait((self._clock() - self._began_s) * (1 / BUSY_SHARE - 1))
        self._began_s = self._clock()

    def _after_layer(self, _layer: nn.Module, _inputs: Any, outputs: tuple[torch.Tensor, Any]) -> None:
        self.rest()
        if outputs[0].requires_grad:
            outputs[0].register_hook(self._after_gradient)

    def _after_gradient(self, _gradient: torch.Tensor) -> None:
        self.rest()

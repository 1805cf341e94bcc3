"""A training on a GPU beside requests: the share of time that it takes, and what it computes."""

import threading
from pathlib import Path

import pytest
import torch

from stellarbyte.checkpoint.native import load_model
from stellarbyte.model.transformer import ByteTransformer
from stellarbyte.train.callbacks.pace import BUSY_SHARE, Pace
from tests.support.tuning.chat_model import make_chat_model

pytest.importorskip("accelerate")


class Device:
    """Computes for a second until each `synchronize`; rests take the time that is asked for."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.computed_s = 0.0
        self.idle = Idle(self)

    def synchronize(self) -> None:
        self.now_s += 1.0
        self.computed_s += 1.0

    def pace(self) -> Pace:
        return Pace(self.idle, self.synchronize, lambda: self.now_s)


class Idle(threading.Event):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device = device

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.device.now_s += timeout
        return self.is_set()


def loss_of(model: ByteTransformer) -> torch.Tensor:
    loss = model(torch.arange(12).reshape(2, 6), labels=torch.arange(12).reshape(2, 6)).loss
    assert loss is not None
    return loss


def test_beside_requests_it_computes_a_share_of_the_time() -> None:
    device = Device()
    pace = device.pace()
    for _ in range(100):
        pace.rest()
    assert device.computed_s / device.now_s == pytest.approx(BUSY_SHARE, rel=0.02)


def test_without_requests_it_never_waits_and_the_time_until_then_does_not_count() -> None:
    device = Device()
    pace = device.pace()
    device.idle.set()
    for _ in range(3):
        pace.rest()
    assert device.now_s == 0
    device.now_s = 1000.0  # computed while there were none
    device.idle.clear()
    pace.rest()
    assert device.now_s == 1001
    pace.rest()
    assert device.now_s == pytest.approx(1001 + 1 / BUSY_SHARE)


@pytest.mark.parametrize("recomputes", [False, True])
def test_each_layer_rests_forward_and_backward_and_computes_the_same(tmp_path: Path, recomputes: bool) -> None:
    folder = make_chat_model(tmp_path / "model")
    plain, paced = (load_model(folder, dtype=torch.float32).train().requires_grad_() for _ in range(2))
    if recomputes:
        for model in (plain, paced):
            model.activation_checkpointing_enable()
    loss_of(plain).backward()

    device = Device()
    device.pace().on_train_begin(None, None, None, model=paced)
    layers = paced.config.num_hidden_layers
    loss = loss_of(paced)
    assert device.computed_s == layers
    loss.backward()
    assert device.computed_s == 2 * layers
    torch.testing.assert_close(loss, loss_of(plain))
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    torch.testing.assert_close({name: parameter.grad for name, parameter in paced.named_parameters()}, gradients)

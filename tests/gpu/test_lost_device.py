"""A card whose context is poisoned computes nothing any more: that is told from a fault of one request."""

import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA device here", allow_module_level=True)

pytestmark = pytest.mark.gpu

POISON = """
import torch
from stellarbyte_server.engine.run.device_errors import device_errors, require_device
from stellarbyte_server.engine.run.executor import DeviceLost

require_device()
torch.zeros(1, device="cuda")[torch.tensor([10**6], device="cuda")]  # asserts on the card, told by a later call
for told in (require_device, torch.cuda.synchronize):
    try:
        with device_errors():
            told()
    except DeviceLost:
        continue
    raise SystemExit("the loss was not noticed")
"""


def test_an_access_out_of_bounds_is_a_lost_device() -> None:
    """In a process of its own, which is of no use afterwards."""
    subprocess.run([sys.executable, "-c", POISON], check=True, timeout=120)

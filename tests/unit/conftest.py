"""Runs the tests of the GPU path on the card, or by Triton's interpreter where there is none."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run: a CUDA device, or the CPU by the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")

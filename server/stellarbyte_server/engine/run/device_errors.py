"""Detection of torch's errors for a device out of memory, or lost."""

import contextlib
from collections.abc import Iterator

import torch

from stellarbyte_server.engine.run.executor import DeviceLost, OutOfDeviceMemory


@contextlib.contextmanager
def device_errors() -> Iterator[None]:
    """Convert torch's out-of-memory error, after releasing its cached memory, and its errors of a lost device.

    An accelerator's error may appear in any later call, and repeats in every call after it.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise OutOfDeviceMemory from error
    except torch.AcceleratorError as error:
        raise DeviceLost("the device failed") from error


def require_device() -> None:
    """After another error, raise DeviceLost if the device cannot complete its work."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:  # Triton and the libraries have no own types
        raise DeviceLost("the device failed") from error

"""Which of torch's errors mean that the device has no memory left, or is lost."""

import contextlib
from collections.abc import Iterator

import torch

from stellarbyte_server.engine.run.executor import DeviceLost, OutOfDeviceMemory


@contextlib.contextmanager
def device_errors() -> Iterator[None]:
    """Torch's error that there is no memory as the engine's, after what is cached of it was given back; and a loss.

    An error of an accelerator may be told by any later call, and comes again with every one: nothing can be computed.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise OutOfDeviceMemory from error
    except torch.AcceleratorError as error:
        raise DeviceLost("the device failed") from error


def require_device() -> None:
    """DeviceLost when the device does not finish what it was given, after some other error."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:  # Triton and the libraries have no types of their own
        raise DeviceLost("the device failed") from error

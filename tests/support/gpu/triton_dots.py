"""Products of tiles in Triton's interpreter as matrix units compute them, for tests of bits.

The interpreter's own are numpy's, whose order of sums depends on a number's place in the tile.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch


@contextmanager
def placeless_dots() -> Iterator[None]:
    """The order of a product's sum depends on the tile's shape, and on nothing else. On a CUDA device: no change."""
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder

    def create_dot(_builder: Any, a: Any, b: Any, d: Any, *_options: Any) -> Any:
        product = _product(_numbers(a, d.data.dtype), _numbers(b, d.data.dtype))
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    with mock.patch.object(builder, "create_dot", create_dot):
        yield


def _numbers(tile: Any, dtype: Any) -> Any:
    """The interpreter holds bfloat16 numbers as their bits."""
    if tile.data.dtype == np.uint16:
        return (tile.data.astype(np.uint32) << 16).view(np.float32).astype(dtype)
    return tile.data.astype(dtype)


def _product(a: Any, b: Any) -> Any:
    """a @ b, input by input; from another one on for each shape, so that a change of the tile shows in the bits."""
    num_inputs = a.shape[-1]
    first = (3 * a.shape[-2] + b.shape[-1]) % num_inputs
    total = np.zeros((*a.shape[:-1], b.shape[-1]), a.dtype)
    for i in range(num_inputs):
        k = (first + i) % num_inputs
        total += a[..., :, k, None] * b[..., None, k, :]
    return total

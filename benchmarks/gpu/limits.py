"""The device's limits: reading and copying memory, bf16 matrix products.

python -m benchmarks.gpu.limits --device cuda
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.workloads import report

REPETITIONS = 10


def least_seconds(work: Callable[[], Any], device: str) -> float:
    """The least time of some repetitions after a first one."""
    work()
    seconds = []
    for _ in range(REPETITIONS):
        if device == "cuda":
            torch.cuda.synchronize()
        started_s = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started_s)
    return min(seconds)


def measure(device: str, num_bytes: int, width: int) -> dict[str, float]:
    """With an array of `num_bytes` and square matrices of `width`."""
    numbers = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(numbers)
    read_s = least_seconds(numbers.sum, device)
    copy_s = least_seconds(lambda: target.copy_(numbers), device)
    a, b = (torch.randn(width, width, device=device).to(torch.bfloat16) for _ in range(2))
    matmul_s = least_seconds(lambda: a @ b, device)
    return {
        "read_tb_s": num_bytes / read_s / 1e12,
        "copy_tb_s": 2 * num_bytes / copy_s / 1e12,
        "matmul_tflop_s": 2 * width**3 / matmul_s / 1e12,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    num_bytes, width = (2**20, 64) if options.tiny else (2**32, 8192)
    report("limits", measure(options.device, num_bytes, width))


if __name__ == "__main__":
    main()

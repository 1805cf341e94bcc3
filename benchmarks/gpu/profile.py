"""Profile of a step: the device's kernels by name, and its idle time."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

SHOWN_KERNELS = 25
NAME_WIDTH = 80


def busy_us(spans: Iterable[tuple[float, float]]) -> float:
    """Time that is covered by at least one (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def profile_steps(step: Callable[[], None], num_steps: int, device: str) -> dict[str, Any]:
    """Run `step` under the profiler: microseconds and launches a step of each kernel, and the share of idle time.

    On a CPU operators replace kernels. For overlapping kernels the time includes the wait for the one before.
    """
    is_gpu = device == "cuda"
    activity = ProfilerActivity.CUDA if is_gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(num_steps):
            step()
        if is_gpu:
            torch.cuda.synchronize()
    kind = DeviceType.CUDA if is_gpu else DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == kind and event.cpu_parent is None]
    events = [event for event in events if not event.is_user_annotation]
    if not events:
        raise RuntimeError("the profiler recorded no kernels")
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    launches = Counter(event.name for event in events)
    time_us: defaultdict[str, float] = defaultdict(float)
    for event in events:
        time_us[event.name] += event.time_range.end - event.time_range.start
    whole_us = max(end for _, end in spans) - min(start for start, _ in spans)
    return {
        "us_a_step": whole_us / num_steps,
        "idle": 1 - busy_us(spans) / whole_us,
        "kernels": [
            {"name": name[:NAME_WIDTH], "us_a_step": us / num_steps, "launches": launches[name] / num_steps}
            for name, us in sorted(time_us.items(), key=lambda item: -item[1])[:SHOWN_KERNELS]
        ],
    }


def print_profile(profile: dict[str, Any]) -> None:
    print(f"{'us a step':>10} {'share':>6} {'launches':>9}  kernel")
    for kernel in profile["kernels"]:
        share = kernel["us_a_step"] / profile["us_a_step"]
        print(f"{kernel['us_a_step']:>10.1f} {share:>6.1%} {kernel['launches']:>9.1f}  {kernel['name']}")
    print(f"{profile['us_a_step']:.1f} us a step with the profiler on")
    print(f"{profile['idle']:.1%} of it the device was idle")

"""Where the time of a step goes: the device's kernels by name, and how long it had nothing to do. Knows no engine."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

SHOWN_KERNELS = 40
NAME_WIDTH = 90


def busy_us(spans: Iterable[tuple[float, float]]) -> float:
    """Time that is covered by at least one (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def print_profile(step: Callable[[], None], num_steps: int, device: str) -> None:
    """Run `step` under the profiler; print time and launches of each kernel a step, and the share of idle time.

    On a CPU its operators stand for kernels.
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
        raise RuntimeError("the profiler saw no kernels")
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    launches = Counter(event.name for event in events)
    time_us: defaultdict[str, float] = defaultdict(float)
    for event in events:
        time_us[event.name] += event.time_range.end - event.time_range.start
    whole_us = max(end for _, end in spans) - min(start for start, _ in spans)
    print(f"{'us a step':>10} {'share':>6} {'launches':>9}  kernel")
    for name in sorted(time_us, key=time_us.__getitem__, reverse=True)[:SHOWN_KERNELS]:
        share = time_us[name] / whole_us
        print(
            f"{time_us[name] / num_steps:>10.1f} {share:>6.1%} {launches[name] / num_steps:>9.1f}  {name[:NAME_WIDTH]}"
        )
    if len(time_us) > SHOWN_KERNELS:
        print(f"and {len(time_us) - SHOWN_KERNELS} others")
    idle = 1 - busy_us(spans) / whole_us
    print(f"{whole_us / num_steps:.1f} us a step with the profiler on; {idle:.1%} of it the device had nothing to do")

"""The machine as the settings use it: its device, data types, memory and cores."""

import importlib.util
import math
import os
import shutil
from pathlib import Path

import torch

from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.start.serving_plan import StartupError

AUTO_CPU_SHARE = 0.25  # of the memory that is free when the engine starts


def available_memory() -> int:
    """Bytes that can be used without swapping, of the machine and of the control group (containers)."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # counts memory that caches would give back
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (allowed := limit.read_text().strip()) != "max":
        available = min(available, int(allowed) - int(used.read_text()))
    return max(0, available)


def cpu_cache_bytes(settings: EngineSettings) -> int:
    """For the cache of a process on a CPU, of each rank."""
    if settings.kv_cache_memory is not None:
        return settings.kv_cache_memory
    return int(available_memory() * AUTO_CPU_SHARE) // num_processes(settings)


def require_triton() -> None:
    """StartupError where the GPU kernels cannot be compiled."""
    if importlib.util.find_spec("triton") is None:
        raise StartupError("--device cuda needs the package triton, which torch's CUDA builds for Linux bring along.")
    compilers = [name for name in (os.environ.get("CC"), "gcc", "clang", "cc") if name and shutil.which(name)]
    if not compilers:
        raise StartupError(
            "--device cuda needs a C compiler, with which Triton builds the launchers of its kernels: install gcc, or"
            " give the variable CC."
        )


def num_processes(settings: EngineSettings) -> int:
    """Ranks of all replicas, which share the cores and the memory of a CPU."""
    return (1 if settings.replicas is None else settings.replicas) * settings.tensor_parallel_size


def num_threads(settings: EngineSettings) -> int:
    """Cores for torch: all this process may use, less one for HTTP where there are many, divided among the
    processes that compute."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ours = cores if cores <= 2 else math.ceil(cores * 0.9) - 1
    return max(1, ours // num_processes(settings))


def dtype_name(dtype: torch.dtype) -> str:
    """As users write it: float32, bfloat16, fp8."""
    return "fp8" if dtype == torch.float8_e4m3fn else str(dtype).removeprefix("torch.")


def cache_dtype_of(settings: EngineSettings, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    if settings.kv_cache_dtype == "auto":
        return dtype
    if device.type == "cpu":
        raise StartupError("--kv-cache-dtype fp8 needs --device cuda; a CPU's cache is as --dtype.")
    return torch.float8_e4m3fn


def device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise StartupError("--device cuda: torch finds no CUDA device here.")
    return torch.device(name)


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]

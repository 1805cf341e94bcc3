"""Writes a benchmark's result as one dated JSON file: command, commit, machine, versions and figures.

Every figure in the documentation comes from a file written here.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
PACKAGES = ("torch", "numpy", "transformers", "uvicorn", "numba", "httptools", "pyzmq", "triton", "vllm")


def write_result(benchmark: str, figures: dict[str, Any]) -> Path:
    """Write results/DATE-BENCHMARK.json (UTC, to the second) and say where; `figures` is plain JSON data."""
    taken_at = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    result = {
        "benchmark": benchmark,
        "taken_at": taken_at.isoformat(),
        "command": _command(),
        "commit": _commit(),
        "device": {"cpu": _cpu_model(), "cores": _num_cores(), "gpu": _gpu_name()},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{taken_at:%Y-%m-%dT%H%M%S}-{benchmark}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {file.relative_to(ROOT)}")
    return file


def read_results(benchmark: str) -> list[dict[str, Any]]:
    """All results of one benchmark, oldest first."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"*-{benchmark}.json"))]


def _command() -> str:
    """The command line, with absolute paths reduced to their last part."""
    module = getattr(sys.modules["__main__"].__spec__, "name", None) or Path(sys.argv[0]).name
    module = module.removesuffix(".__main__")
    arguments = [re.sub(r"(?<![^\s=])(?:/[^/\s]+)*/(?=[^/\s])", "", argument) for argument in sys.argv[1:]]
    return shlex.join(["python", "-m", module, *arguments])


def _commit() -> str:
    """The commit, with "+changes" when files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu_name() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

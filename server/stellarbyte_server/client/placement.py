"""How many replicas a server runs, and the devices of each."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from stellarbyte_server.config.setting_values import SettingsError
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.import_path import safe_environment

VISIBLE = "CUDA_VISIBLE_DEVICES"
_COUNT = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"


def replica_environments(settings: EngineSettings, gpus: Sequence[str]) -> list[dict[str, str]]:
    """The variables that differ between the replicas' processes, one entry for each replica.

    Args:
        gpus: names of the GPUs that may be used, as `visible_gpus` returns them; none: replicas run on the CPU.

    Raises:
        SettingsError: more replicas than GPUs.
    """
    if not gpus:
        return [{} for _ in range(1 if settings.replicas is None else settings.replicas)]
    number = len(gpus) if settings.replicas is None else settings.replicas
    if number > len(gpus):
        raise SettingsError(f"--replicas: {number} is more than the {len(gpus)} GPUs that torch finds")
    return [{VISIBLE: gpus[index]} for index in range(number)]


def visible_gpus(settings: EngineSettings, ours: Mapping[str, str]) -> list[str]:
    """The GPUs that replicas may use, as CUDA_VISIBLE_DEVICES names them; none if --device is cpu.

    Asks torch in a process of its own, which takes seconds: this process must not hold a CUDA context.
    """
    if settings.device == "cpu":
        return []
    counted = subprocess.run(
        [sys.executable, "-c", _COUNT], env=safe_environment(ours), capture_output=True, text=True, check=False
    )
    lines = counted.stdout.split()  # a library may print before
    number = int(lines[-1]) if lines and lines[-1].isdecimal() else 0
    named = [name.strip() for name in ours.get(VISIBLE, "").split(",") if name.strip()]
    return named[:number] if named else [str(index) for index in range(number)]


def place(settings: EngineSettings) -> list[dict[str, str]]:
    """The variables of each replica of a server with these settings, on this machine; SettingsError.

    One replica takes the device that it finds, as without the flag.
    """
    if settings.replicas == 1:
        return [{}]
    return replica_environments(settings, visible_gpus(settings, os.environ))


def share_of_each(settings: EngineSettings, number: int) -> EngineSettings:
    """The settings of each of so many replicas: their number is known, and each has a part of the queue."""
    queued = -(-settings.max_queued_requests // number)
    return dataclasses.replace(settings, replicas=number, max_queued_requests=queued)

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
_LAST_PORT = 65535
_EVERY_HOST = {"tcp://*", "tcp://0.0.0.0", "tcp://[::]"}
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
    ranks = settings.tensor_parallel_size
    number = max(1, len(gpus) // ranks) if settings.replicas is None else settings.replicas
    if number * ranks > len(gpus):
        each = "" if ranks == 1 else f" times --tensor-parallel-size {ranks}"
        raise SettingsError(f"--replicas: {number}{each} is more than the {len(gpus)} GPUs that torch finds")
    return [{VISIBLE: ",".join(gpus[index * ranks : (index + 1) * ranks])} for index in range(number)]


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


def _check_event_ports(settings: EngineSettings, number: int) -> None:
    """SettingsError unless each replica has ports of its own: it adds its index to those of the settings."""
    flags = {"--kv-events": settings.kv_events, "--kv-events-replay": settings.kv_events_replay}
    places = {flag: address.rpartition(":") for flag, address in flags.items() if address is not None}
    for flag, (_, _, port) in places.items():
        if int(port) + number - 1 > _LAST_PORT:
            raise SettingsError(f"{flag}: {number} replicas need the ports from {port} on; give a lower one")
    if len(places) == 2:
        (host, _, port), (other_host, _, other_port) = places.values()
        is_one_host = host == other_host or not _EVERY_HOST.isdisjoint((host, other_host))
        if is_one_host and abs(int(port) - int(other_port)) < number:
            raise SettingsError(
                f"--kv-events-replay: its port must be at least {number} from that of --kv-events, as each replica adds"
                " its index to both"
            )


def share_of_each(settings: EngineSettings, number: int) -> EngineSettings:
    """The settings of each of so many replicas: their number is known, and each has a part of the queue.

    Raises:
        SettingsError: replicas would share a port of --kv-events.
    """
    _check_event_ports(settings, number)
    queued = -(-settings.max_queued_requests // number)
    return dataclasses.replace(settings, replicas=number, max_queued_requests=queued)

"""Which GPUs may use symmetric memory, from what the driver says of the ways between them."""

import ctypes

import pytest
import torch

from stellarbyte.parallel.peers import why_no_peer_memory

ACCESS, NATIVE_ATOMICS = 2, 3


class Driver:
    """libcuda of a machine whose GPUs have a property between each pair, but for those that are `missing`."""

    def __init__(self, missing: set[tuple[int, int, int]]) -> None:
        self._missing = missing

    def cuDeviceGet(self, handle, ordinal: int) -> int:
        handle._obj.value = 10 + ordinal
        return 0

    def cuDeviceGetP2PAttribute(self, value, attribute: int, device, other) -> int:
        value._obj.value = int((attribute, device.value - 10, other.value - 10) not in self._missing)
        return 0


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        (set(), ""),
        ({(ACCESS, 1, 3)}, "GPU 1 has no access to the memory of GPU 3"),
        ({(NATIVE_ATOMICS, 1, 0)}, "GPU 1 has no atomic operations in the memory of GPU 0"),
        ({(NATIVE_ATOMICS, 1, 4), (ACCESS, 0, 1)}, ""),  # of other GPUs and other ranks
    ],
)
def test_a_gpu_needs_access_and_atomics_to_all_others(
    missing: set[tuple[int, int, int]], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver(missing))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda _device, _other: True)
    assert why_no_peer_memory(1, 4) == reason


def test_without_the_driver_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert why_no_peer_memory(0, 2) == "libcuda.so.1: cannot open shared object file"

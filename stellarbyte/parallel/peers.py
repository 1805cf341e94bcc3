"""Whether GPUs can share memory as torch's symmetric memory needs it, without which its kernels wait forever."""

import ctypes

import torch

# Of cuDeviceGetP2PAttribute
_ACCESS, _NATIVE_ATOMICS = 2, 3


def why_no_peer_memory(device: int, devices: int) -> str:
    """Why a GPU cannot share memory with all others of the first `devices`; "": it can."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return str(error)
    for other in range(devices):
        if other == device:
            continue
        if not torch.cuda.can_device_access_peer(device, other) or not _attribute(driver, _ACCESS, device, other):
            return f"GPU {device} has no access to the memory of GPU {other}"
        if not _attribute(driver, _NATIVE_ATOMICS, device, other):  # as over PCIe
            return f"GPU {device} has no atomic operations in the memory of GPU {other}"
    return ""


def _attribute(driver: ctypes.CDLL, attribute: int, device: int, other: int) -> int:
    """A property of the way between two GPUs; 0 if the driver does not know it."""
    value, handles = ctypes.c_int(0), [ctypes.c_int(), ctypes.c_int()]
    for handle, ordinal in zip(handles, (device, other), strict=True):
        if driver.cuDeviceGet(ctypes.byref(handle), ordinal) != 0:
            return 0
    status = driver.cuDeviceGetP2PAttribute(ctypes.byref(value), attribute, handles[0], handles[1])
    return value.value if status == 0 else 0

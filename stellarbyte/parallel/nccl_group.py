"""How ranks on the GPUs of one machine exchange tensors: NCCL, and for what fits in it torch's symmetric memory.

Both may be captured in CUDA graphs. NVLink multicast is never used, for which both have a switch.
"""

import logging
import os
from pathlib import Path
from typing import Literal

import torch
from torch import distributed

from stellarbyte.parallel.group import CONNECT_TIMEOUT, TIMEOUT

logger = logging.getLogger(__name__)

# On two H200s a sum of bfloat16 takes, in µs, by NCCL, by one shot and by two: of 8 KiB 11.3, 6.3, 6.3; of 512 KiB
# 15.1, 9.7, 7.7; of 2 MiB 33, 19, 13; of 16 MiB 79, 97, 58.
ONE_SHOT_BYTES = 64 * 2**10
SYMMETRIC_BYTES = 16 * 2**20
_TWO_SHOT_RANKS = (2, 4, 8)  # torch has its kernel for these
_ALIGNMENT = 16  # bytes that the symmetric kernels read at once, of each rank's part in two shots

_SWITCHES = {
    "NCCL_NVLS_ENABLE": "0",  # multicast
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NCCL_RUNTIME_CONNECT": "0",  # connect all at the start, not while a graph is captured
    # Rank 0 watches the others. These threads of torch would read the store, which is gone after `connect`.
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}


def path_of(num_bytes: int, ranks: int) -> Literal["one shot", "two shots", "nccl"]:
    """How a sum of so many bytes goes where there is symmetric memory."""
    if num_bytes > SYMMETRIC_BYTES or num_bytes % (_ALIGNMENT * ranks):
        return "nccl"
    if num_bytes <= ONE_SHOT_BYTES:
        return "one shot"
    return "two shots" if ranks in _TWO_SHOT_RANKS else "nccl"


class NcclGroup:
    """A `RankGroup` of processes, each with a GPU of its own. `connect` comes before all else. One thread, one stream.

    Args:
        store: as of `GlooGroup`.
        device: of this rank, with its index; ranks see the same devices, and each has another one.
    """

    def __init__(self, store: Path, rank: int, ranks: int, device: torch.device) -> None:
        self.rank = rank
        self.ranks = ranks
        self._store = store
        self._device = device
        self._name = ""
        self._symmetric: torch.Tensor | None = None  # bytes that all ranks can read

    def connect(self) -> None:
        """Wait for the other ranks; afterwards the store may be removed.

        Raises:
            RuntimeError: they do not come within a minute.
        """
        os.environ.update(_SWITCHES)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        shared = distributed.FileStore(str(self._store), self.ranks)  # type: ignore[attr-defined]
        shared.set_timeout(CONNECT_TIMEOUT)
        distributed.init_process_group(
            "nccl", store=shared, rank=self.rank, world_size=self.ranks, timeout=TIMEOUT, device_id=self._device
        )
        assert distributed.group.WORLD is not None
        self._name = distributed.group.WORLD.group_name
        self._symmetric = self._make_symmetric()
        for limit in (ONE_SHOT_BYTES, SYMMETRIC_BYTES, 4 * SYMMETRIC_BYTES):  # each loads its kernels
            size = limit - limit % (_ALIGNMENT * self.ranks)
            for dtype in (torch.bfloat16, torch.float32):
                self.all_gather(self.all_reduce(torch.zeros(size // dtype.itemsize, dtype=dtype, device=self._device)))
        torch.cuda.synchronize(self._device)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        size, x = x.nbytes, x.contiguous()
        path = path_of(size, self.ranks)
        if self._symmetric is None or path == "nccl":
            distributed.all_reduce(x)
            return x
        shared = self._symmetric[:size].view(x.dtype).view(x.shape)
        if path == "one shot":
            return torch.ops.symm_mem.one_shot_all_reduce_copy(shared, x, "sum", self._name)
        shared.copy_(x)
        return torch.ops.symm_mem.two_shot_all_reduce_out(shared, "sum", self._name, x)

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        gathered = x.new_empty(self.ranks, *x.shape)
        distributed.all_gather_into_tensor(gathered, x.contiguous())
        return list(gathered)

    def _make_symmetric(self) -> torch.Tensor | None:
        """The symmetric memory, on all ranks or on none."""
        memory, reason = None, "another rank has none"
        try:
            import torch.distributed._symmetric_memory as symmetric

            memory = symmetric.empty(SYMMETRIC_BYTES, dtype=torch.uint8, device=self._device)
            symmetric.rendezvous(memory, self._name)  # type: ignore[arg-type]  # a GroupName is a str
        except (ImportError, AttributeError, RuntimeError) as error:
            memory, reason = None, " ".join(str(error).split())
        has_memory = self.all_reduce(torch.tensor([float(memory is not None)], device=self._device))
        if int(has_memory.item()) == self.ranks:
            return memory
        logger.info("sums over ranks go through NCCL alone: no symmetric memory (%s)", reason)
        return None

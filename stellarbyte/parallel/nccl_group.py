"""How ranks on the GPUs of one machine exchange tensors: NCCL, and for what fits in it torch's symmetric memory.

Both may be captured in CUDA graphs. NVLink multicast is never used, for which both have a switch.
"""

import os
from pathlib import Path
from typing import Literal

import torch
from torch import distributed

from stellarbyte.parallel.group import CONNECT_TIMEOUT, TIMEOUT
from stellarbyte.parallel.peers import why_no_peer_memory

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
    "NCCL_GRAPH_REGISTER": "0",  # a capture would exchange addresses with the other ranks
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
    """A `RankGroup` of processes, each with a GPU of its own. `connect` comes before all else, then one thread and one
    stream use it.

    Args:
        device: of this rank, with its index; ranks see the same devices, and each has another one.

    Attributes:
        no_symmetric_memory: once connected, why all sums go through NCCL; "": they do not.
    """

    def __init__(self, rank: int, ranks: int, device: torch.device) -> None:
        self.rank = rank
        self.ranks = ranks
        self.num_calls = 0
        self._device = device
        self._name = ""
        self._symmetric: torch.Tensor | None = None  # bytes that all ranks can read
        self.no_symmetric_memory = ""

    def connect(self, store: Path) -> None:
        """Wait for the other ranks; afterwards the store may be removed. Any thread.

        NCCL waits without a limit for a rank that has ended or hangs, so the caller watches them.

        Args:
            store: as of `GlooGroup.connect`.

        Raises:
            RuntimeError: they do not come to the store within a minute, or NCCL fails.
        """
        torch.cuda.set_device(self._device)  # of this thread
        os.environ.update(_SWITCHES)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        shared = distributed.FileStore(str(store), self.ranks)  # type: ignore[attr-defined]
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
        self.num_calls += 1
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
        self.num_calls += 1
        gathered = x.new_empty(self.ranks, *x.shape)
        distributed.all_gather_into_tensor(gathered, x.contiguous())
        return list(gathered)

    def _make_symmetric(self) -> torch.Tensor | None:
        """The symmetric memory, on all ranks or on none; notes why this rank has none."""
        assert self._device.index is not None
        memory = None
        reason = why_no_peer_memory(self._device.index, self.ranks)
        if not reason:
            try:
                import torch.distributed._symmetric_memory as symmetric

                memory = symmetric.empty(SYMMETRIC_BYTES, dtype=torch.uint8, device=self._device)
            except (ImportError, AttributeError, RuntimeError) as error:
                reason = " ".join(str(error).split())
        if self._all_have(memory):  # otherwise some would wait for the others in `rendezvous`
            try:
                symmetric.rendezvous(memory, self._name)  # type: ignore[arg-type]  # a GroupName is a str
            except RuntimeError as error:
                memory, reason = None, " ".join(str(error).split())
            if self._all_have(memory):
                return memory
        self.no_symmetric_memory = reason or "another rank has none"
        return None

    def _all_have(self, memory: torch.Tensor | None) -> bool:
        num_have = self.all_reduce(torch.tensor([float(memory is not None)], device=self._device))
        return int(num_have.item()) == self.ranks

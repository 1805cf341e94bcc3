"""How ranks exchange tensors: sums and gathers that leave the same bits on every rank."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import distributed

# A rank that has died closes its connections, which others see at once; this limit is for one that hangs.
TIMEOUT = timedelta(minutes=5)
CONNECT_TIMEOUT = timedelta(minutes=1)


class RankGroup(Protocol):
    """The ranks that compute one model. Each calls the same methods in the same order, with tensors of equal shape.

    Attributes:
        num_calls: of `all_reduce` and `all_gather` so far.
    """

    rank: int
    ranks: int
    num_calls: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, of x's shape and dtype. x may change."""
        ...

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The tensor of each rank, in their order."""
        ...


class SingleRankGroup:
    """No other ranks: results have the shapes of a group's, and lack what the others would give."""

    num_calls = 0

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank = rank
        self.ranks = ranks

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x] * self.ranks


class GlooGroup:
    """Processes of one machine on its CPUs, over the loopback interface. `connect` comes before all else."""

    no_symmetric_memory = ""  # see `NcclGroup`

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank = rank
        self.ranks = ranks
        self.num_calls = 0
        self._group: Any = None

    def connect(self, store: Path) -> None:
        """Wait for the other ranks; afterwards the store may be removed.

        Args:
            store: a path in a folder that only this user may enter, the same for all ranks; no such file exists yet.

        Raises:
            RuntimeError: they do not come within a minute.
        """
        if Path("/sys/class/net/lo").exists():  # otherwise that of the host's name, which others may reach
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        shared = distributed.FileStore(str(store), self.ranks)  # type: ignore[attr-defined]
        shared.set_timeout(CONNECT_TIMEOUT)
        self._group = distributed.ProcessGroupGloo(shared, self.rank, self.ranks, TIMEOUT)
        self.all_reduce(torch.zeros(1))

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        wide = x.contiguous() if x.dtype.itemsize >= 4 else x.float()
        self._group.allreduce([wide]).wait()
        return wide.to(x.dtype)

    def all_gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.num_calls += 1
        gathered = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.ranks)]
        self._group.allgather([gathered], [x.contiguous()]).wait()
        return gathered

"""The processes of one run, started by torchrun or alone."""

import os

import torch
from torch import distributed


def ranks_expected() -> int:
    """Of torchrun's environment: known before the ranks have found each other."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_expected() -> int:
    """As `ranks_expected`."""
    return int(os.environ.get("RANK", "0"))


def is_first_rank() -> bool:
    return not is_distributed() or distributed.get_rank() == 0


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on some rank. Every rank must call it at the same place."""
    if not is_distributed():
        return flag
    number = torch.tensor(int(flag), device=device)
    distributed.all_reduce(number, op=distributed.ReduceOp.MAX)
    return bool(number)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's tensor, in place. Every rank must call it at the same place."""
    if is_distributed():
        distributed.all_reduce(values)
    return values


def wait_for_all() -> None:
    if is_distributed():
        distributed.barrier()


def leave_group() -> None:
    """At the end of a rank's run: threads of gloo that still run could abort its process as it exits."""
    if is_distributed():
        distributed.destroy_process_group()


def is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()

"""From settings to a group of tensor-parallel ranks, of which this process is rank 0."""

import dataclasses
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from stellarbyte.backends.torch_model import TorchModel
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.config import ByteModelConfig
from stellarbyte.lora.bank import LoraBank
from stellarbyte.parallel.group import CONNECT_TIMEOUT, GlooGroup
from stellarbyte.parallel.nccl_group import NcclGroup
from stellarbyte.parallel.shares import RankShare, UndividedError, refuse_undivided
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.ranks.bank import RanksBank
from stellarbyte_server.engine.ranks.captures import LeadingOrder
from stellarbyte_server.engine.ranks.executor import RankExecutor, RanksExecutor
from stellarbyte_server.engine.ranks.messages import (
    Connect,
    RankLoaded,
    RankMeasured,
    RankServes,
    RankStart,
    ServeCache,
)
from stellarbyte_server.engine.ranks.processes import RankLost, RankProcesses
from stellarbyte_server.engine.run.host_executor import HostExecutor
from stellarbyte_server.engine.start.machine import (
    cache_dtype_of,
    cpu_cache_bytes,
    num_threads,
    require_triton,
)
from stellarbyte_server.engine.start.model_folder import ModelFolder
from stellarbyte_server.engine.start.serving_plan import (
    ServingPlan,
    StartupError,
    layout_of,
    plan_serving,
    serving_config,
    tokens_a_step,
)

if TYPE_CHECKING:
    from stellarbyte.backends.gpu.preparation import CaptureOrder  # needs Triton

logger = logging.getLogger("server.engine")

CPU = torch.device("cpu")


def refuse_ranks(settings: EngineSettings, config: ByteModelConfig, device: torch.device) -> None:
    """Raise StartupError for what several ranks cannot serve; reads no weights."""
    flag = f"--tensor-parallel-size {settings.tensor_parallel_size}"
    if device.type == "cpu" and settings.quantization != "none":
        raise StartupError(
            f"{flag} cannot be used with --quantization {settings.quantization}: ranks on CPUs compute in plain torch."
        )
    if settings.deterministic:
        raise StartupError(f"{flag} cannot be used with --deterministic, which is of the kernels of one process.")
    try:
        refuse_undivided(config, settings.tensor_parallel_size)
    except UndividedError as error:
        raise StartupError(f"{flag}: {error}.") from error
    if device.type == "cpu":
        return
    if config.num_experts:
        raise StartupError(f"{flag} needs --device cpu for a model with experts: on GPUs ranks do not divide them.")
    if (found := torch.cuda.device_count()) < settings.tensor_parallel_size:
        raise StartupError(f"{flag} needs a GPU for each rank, but torch finds {found}.")


def make_bank(settings: EngineSettings, config: ByteModelConfig, dtype: torch.dtype, device: torch.device) -> LoraBank:
    """Slots for the adapters that the settings allow, none if they allow none; of a model or a rank's share."""
    num_slots = settings.max_loras if settings.serves_adapters else 0
    return LoraBank(config, num_slots, settings.max_lora_rank if num_slots else 0, dtype, device)


class EngineStart(Protocol):
    """A rank's loaded part of the model, without cache."""

    def plan(self, budget: int) -> ServingPlan:
        """What is served with so many bytes of cache; StartupError: one sequence does not fit."""
        ...

    def cache_bytes(self) -> int:
        """The bytes that this rank has for its part of the cache."""
        ...

    def executor(self, max_model_len: int, num_blocks: int, order: "CaptureOrder | None" = None, /) -> RankExecutor:
        """Make the executor of the rank's steps, with a cache of its own key-value heads. Called once."""
        ...


@dataclass(frozen=True, kw_only=True)
class HostStart:
    """The part of a rank on a CPU, in plain torch."""

    settings: EngineSettings
    model: TorchModel
    config: ByteModelConfig  # of the rank's share

    def plan(self, budget: int) -> ServingPlan:
        return plan_serving(
            self.config, self.settings, self.model.bank.dtype, tokens_a_step(self.settings, "cpu")[0], budget
        )

    def cache_bytes(self) -> int:
        return cpu_cache_bytes(self.settings)

    def executor(self, max_model_len: int, num_blocks: int, _order: object = None, /) -> HostExecutor:
        asked = dataclasses.replace(self.settings, max_model_len=max_model_len)
        served, _ = serving_config(self.config, asked)
        layout = layout_of(served, asked)
        cache = PagedKVCache(served, num_blocks, layout.block_size, self.model.bank.dtype, CPU)
        return HostExecutor(self.model.with_windows_of(served), cache, layout)


@dataclass(frozen=True, kw_only=True)
class LoadedRank:
    """A rank whose part of the model is loaded.

    Attributes:
        bank: its part of the adapters.
        quantization: of the weights.
        weight: of a module of the whole model, as steps multiply by it; None: the weights are random.
    """

    bank: LoraBank
    start: EngineStart
    quantization: str
    weight: Callable[[str], torch.Tensor] | None


def load_rank(
    settings: EngineSettings,
    folder: ModelFolder,
    dtype: torch.dtype,
    group: GlooGroup | NcclGroup,
    device: torch.device,
) -> LoadedRank:
    """Read the rank's part of the model. Any rank.

    Raises:
        CheckpointError: a file cannot be read.
        StartupError: the GPU kernels do not support the model, or the ranks cannot divide its quantized matrices.
    """
    share = RankShare(config=folder.config, rank=group.rank, ranks=group.ranks)
    bank = make_bank(settings, share.own_config, dtype, device)
    if device.type == "cpu":
        model = TorchModel(folder.rank_model(share, group, dtype), share.own_config, bank)
        start: EngineStart = HostStart(settings=settings, model=model, config=share.own_config)
        return LoadedRank(
            bank=bank, start=start, quantization="none", weight=None if folder.is_dummy else folder.weight
        )  # fmt: skip
    require_triton()
    from stellarbyte_server.engine.start.gpu_engine import GpuStart
    from stellarbyte_server.engine.start.gpu_rank import load_gpu_model, whole_weights  # Triton is not needed on a CPU

    quantization = settings.quantization
    try:
        packed = load_gpu_model(folder, share, group, bank, quantization)
    except CheckpointError:  # a ValueError, too
        raise
    except ValueError as error:
        flag = f"--tensor-parallel-size {group.ranks}"
        raise StartupError(f"{flag} cannot serve this model on GPUs: {str(error).removesuffix('.')}.") from error
    return LoadedRank(
        bank=bank,
        start=GpuStart(packed, settings, cache_dtype_of(settings, dtype, device)),
        quantization=packed.quantization,
        weight=None if folder.is_dummy else whole_weights(folder, share, packed, quantization),
    )


def make_group(rank: int, ranks: int, device: torch.device) -> GlooGroup | NcclGroup:
    """The group through which a rank on this device meets the others."""
    return GlooGroup(rank, ranks) if device.type == "cpu" else NcclGroup(rank, ranks, device)


def device_of_rank(kind: str, rank: int) -> torch.device:
    """Find the device of a rank, "cpu" or "cuda"; a GPU becomes the calling thread's current one."""
    if kind == "cpu":
        return CPU
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


@dataclass(frozen=True, kw_only=True)
class LoadedRanks:
    """All ranks with their models, and the one of this process."""

    own: LoadedRank
    group: GlooGroup | NcclGroup
    others: RankProcesses
    bank: RanksBank

    def serve(self) -> tuple[RanksExecutor, ServingPlan]:
        """The executor of all ranks, each with as much cache as the one that has least, and what it serves.

        Raises:
            StartupError: one sequence does not fit, or a rank has ended.
        """
        start = self.own.start
        try:
            measured = self.others.answers(RankMeasured)
            _log_symmetric_memory([self.group.no_symmetric_memory, *(said.no_symmetric_memory for said in measured)])
            budgets = [start.cache_bytes(), *(said.cache_bytes for said in measured)]
            plan = start.plan(min(budgets))  # rank 0 has the most key-value heads
            self.others.send(ServeCache(max_model_len=plan.max_model_len, num_blocks=plan.cache.num_blocks))
            executor = start.executor(plan.max_model_len, plan.cache.num_blocks, LeadingOrder(self.others))
            self.others.answers(RankServes)
            self.others.serve()
        except RankLost as lost:
            raise StartupError(f"{lost}.") from lost
        return RanksExecutor(executor, self.others), plan


def load_ranks(settings: EngineSettings, folder: ModelFolder, dtype: torch.dtype, kind: torch.device) -> LoadedRanks:
    """Start the other ranks and load the model on all of them.

    Args:
        kind: of device.

    Raises:
        StartupError: a rank could not start.
        CheckpointError: a file cannot be read.
    """
    ranks, threads, device = settings.tensor_parallel_size, num_threads(settings), device_of_rank(kind.type, 0)
    torch.set_num_threads(threads)
    share = RankShare(config=folder.config, rank=0, ranks=ranks)
    divided = "" if share.is_even else "; the model's heads are not a multiple of the ranks, so some have more"
    where = f"ranks of {threads} threads in plain torch" if device.type == "cpu" else "GPUs"
    logger.info("dividing the model among %d %s%s", ranks, where, divided)
    told = dataclasses.replace(
        settings, model=str(folder.path), dtype=str(dtype).removeprefix("torch."), device=device.type
    )  # fmt: skip
    others = RankProcesses([RankStart(settings=told, rank=rank, num_threads=threads) for rank in range(1, ranks)])
    try:
        group = make_group(0, ranks, device)
        own = load_rank(settings, folder, dtype, group, device)
        others.answers(RankLoaded)
        with tempfile.TemporaryDirectory(prefix="stellarbyte-ranks-", ignore_cleanup_errors=True) as private:
            store = Path(private, "store")
            others.send(Connect(str(store)))
            others.while_all_live(lambda: group.connect(store), 2 * CONNECT_TIMEOUT.total_seconds())
    except RankLost as lost:
        others.close()
        raise StartupError(f"{lost}.") from lost
    except Exception:
        others.close()
        raise
    return LoadedRanks(own=own, group=group, others=others, bank=RanksBank(own.bank, share, others))


def _log_symmetric_memory(reasons: list[str]) -> None:
    """`reasons`: why each rank has none."""
    for rank, reason in enumerate(reasons):
        if reason:
            logger.info("tensor-parallel rank %d sums through NCCL alone: no symmetric memory (%s)", rank, reason)

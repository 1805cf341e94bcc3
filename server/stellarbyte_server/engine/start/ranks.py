"""From settings to a group of tensor-parallel ranks, of which this process is rank 0."""

import dataclasses
import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from stellarbyte.backends.torch_model import TorchModel
from stellarbyte.cache.paged_kv import PagedKVCache
from stellarbyte.config import ByteModelConfig
from stellarbyte.lora.bank import LoraBank
from stellarbyte.parallel.group import GlooGroup
from stellarbyte.parallel.shares import RankShare, UndividedError, refuse_undivided
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.engine.ranks.bank import RanksBank
from stellarbyte_server.engine.ranks.executor import RanksExecutor
from stellarbyte_server.engine.ranks.messages import RankLoaded, RankServes, RankStart, ServeCache
from stellarbyte_server.engine.ranks.processes import RankLost, RankProcesses
from stellarbyte_server.engine.run.host_executor import HostExecutor
from stellarbyte_server.engine.start.model_folder import ModelFolder
from stellarbyte_server.engine.start.serving_plan import (
    ServingPlan,
    StartupError,
    layout_of,
    plan_serving,
    serving_config,
    tokens_a_step,
)

logger = logging.getLogger("server.engine")

CPU = torch.device("cpu")


def refuse_ranks(settings: EngineSettings, config: ByteModelConfig, device: torch.device) -> None:
    """Raise StartupError for what several ranks cannot serve; reads no weights."""
    flag = f"--tensor-parallel-size {settings.tensor_parallel_size}"
    if device.type != "cpu":
        raise StartupError(f"{flag} needs --device cpu: the GPU kernels serve a model on one GPU only.")
    if settings.quantization != "none":
        raise StartupError(
            f"{flag} cannot be used with --quantization {settings.quantization}: ranks on CPUs compute in plain torch."
        )
    if settings.deterministic:
        raise StartupError(f"{flag} cannot be used with --deterministic, which is of the kernels of one process.")
    try:
        refuse_undivided(config, settings.tensor_parallel_size)
    except UndividedError as error:
        raise StartupError(f"{flag}: {error}.") from error


def make_bank(settings: EngineSettings, config: ByteModelConfig, dtype: torch.dtype, device: torch.device) -> LoraBank:
    """Slots for the adapters that the settings allow, none if they allow none; of a model or a rank's share."""
    num_slots = settings.max_loras if settings.serves_adapters else 0
    return LoraBank(config, num_slots, settings.max_lora_rank if num_slots else 0, dtype, device)


@dataclass(frozen=True, kw_only=True)
class LoadedRank:
    """What any rank has once its part of the model is loaded."""

    settings: EngineSettings
    share: RankShare
    dtype: torch.dtype
    bank: LoraBank  # its part of the adapters
    model: TorchModel

    def executor(self, max_model_len: int, num_blocks: int) -> HostExecutor:
        """The executor of the rank's steps, with a cache of its own key-value heads."""
        asked = dataclasses.replace(self.settings, max_model_len=max_model_len)
        served, _ = serving_config(self.share.own_config, asked)
        layout = layout_of(served, asked)
        cache = PagedKVCache(served, num_blocks, layout.block_size, self.dtype, CPU)
        return HostExecutor(self.model.with_windows_of(served), cache, layout)


def load_rank(settings: EngineSettings, folder: ModelFolder, dtype: torch.dtype, group: GlooGroup) -> LoadedRank:
    """Read the rank's part of the model. Any rank.

    Raises:
        CheckpointError: a file cannot be read.
    """
    share = RankShare(config=folder.config, rank=group.rank, ranks=group.ranks)
    bank = make_bank(settings, share.own_config, dtype, CPU)
    model = TorchModel(folder.rank_model(share, group, dtype), share.own_config, bank)
    return LoadedRank(settings=settings, share=share, dtype=dtype, bank=bank, model=model)


@dataclass(frozen=True, kw_only=True)
class LoadedRanks:
    """All ranks with their models, and the one of this process."""

    own: LoadedRank
    others: RankProcesses
    bank: RanksBank

    def serve(self, budget: int) -> tuple[RanksExecutor, ServingPlan]:
        """The executor of all ranks, each with `budget` bytes of cache, and what it serves.

        Raises:
            StartupError: one sequence does not fit, or a rank has ended.
        """
        settings, config = self.own.settings, self.own.share.own_config  # rank 0 has the most key-value heads
        plan = plan_serving(config, settings, self.own.dtype, tokens_a_step(settings, "cpu")[0], budget)
        self.others.send(ServeCache(max_model_len=plan.max_model_len, num_blocks=plan.cache.num_blocks))
        executor = self.own.executor(plan.max_model_len, plan.cache.num_blocks)
        try:
            self.others.answers(RankServes)
            self.others.serve()
        except RankLost as lost:
            raise StartupError(f"{lost}.") from lost
        return RanksExecutor(executor, self.others), plan


def load_ranks(settings: EngineSettings, folder: ModelFolder, dtype: torch.dtype, num_threads: int) -> LoadedRanks:
    """Start the other ranks and load the model on all of them.

    Args:
        num_threads: of each rank.

    Raises:
        StartupError: a rank could not start.
        CheckpointError: a file cannot be read.
    """
    ranks = settings.tensor_parallel_size
    torch.set_num_threads(num_threads)
    share = RankShare(config=folder.config, rank=0, ranks=ranks)
    divided = (
        "" if share.is_even else "; the model's heads are not a multiple of the ranks, so the first ones have more"
    )
    logger.info("dividing the model among %d ranks of %d threads in plain torch%s", ranks, num_threads, divided)
    private = Path(tempfile.mkdtemp(prefix="stellarbyte-ranks-"))  # mode 0700
    told = dataclasses.replace(settings, model=str(folder.path), dtype=str(dtype).removeprefix("torch."))
    starts = [
        RankStart(settings=told, rank=rank, store=str(private / "store"), num_threads=num_threads)
        for rank in range(1, ranks)
    ]
    others = RankProcesses(starts)
    try:
        group = GlooGroup(private / "store", 0, ranks)
        own = load_rank(settings, folder, dtype, group)
        others.answers(RankLoaded)
        group.connect()
    except RankLost as lost:
        others.close()
        raise StartupError(f"{lost}.") from lost
    except Exception:
        others.close()
        raise
    finally:
        shutil.rmtree(private, ignore_errors=True)
    return LoadedRanks(own=own, others=others, bank=RanksBank(own.bank, share, others))

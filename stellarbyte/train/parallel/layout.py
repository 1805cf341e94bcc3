"""How the ranks of a run divide a model and its data, and what cannot be divided."""

from dataclasses import dataclass

from stellarbyte.config import ByteModelConfig
from stellarbyte.train.config.run import Parallel
from stellarbyte.train.errors import TrainError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Rank r is rank r % tensor of its tensor-parallel group; the ranks of a group read the same rows.

    Attributes:
        replicas: copies of the model; each is held by fsdp · tensor ranks.
        fsdp: ranks that divide the parameters of a copy, gradients and optimizer state with them.
        tensor: ranks that divide the computation of a layer.
    """

    replicas: int = 1
    fsdp: int = 1
    tensor: int = 1

    def __str__(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        return f"{ranks} (fsdp {self.fsdp}, tensor {self.tensor})" if self.is_sharded else ranks

    @property
    def ranks(self) -> int:
        return self.data_ranks * self.tensor

    @property
    def data_ranks(self) -> int:
        """Groups of ranks with rows of their own."""
        return self.replicas * self.fsdp

    @property
    def is_sharded(self) -> bool:
        return self.fsdp * self.tensor > 1

    def data_rank(self, rank: int) -> int:
        return rank // self.tensor

    def is_first_of_group(self, rank: int) -> bool:
        """Whether the rank counts where a sum over all ranks must hold every row once."""
        return rank % self.tensor == 0


def layout_of(settings: Parallel, ranks: int) -> Layout:
    """Raises TrainError: the ranks are not a multiple of those that one copy of the model needs."""
    of_a_copy = settings.fsdp * settings.tensor
    if ranks % of_a_copy:
        raise TrainError(
            f"parallel.fsdp ({settings.fsdp}) × parallel.tensor ({settings.tensor}) needs a multiple of {of_a_copy} "
            f"ranks, but {ranks} {'was' if ranks == 1 else 'were'} started; start them with torchrun --nproc-per-node."
        )
    return Layout(replicas=ranks // of_a_copy, fsdp=settings.fsdp, tensor=settings.tensor)


def refuse_undivided(config: ByteModelConfig, tensor: int) -> None:
    """Raise TrainError for a model whose layers `tensor` ranks cannot divide exactly."""
    if tensor == 1:
        return
    sizes = {"num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads}
    if None in config.expert_layers:
        sizes["intermediate_size"] = config.intermediate_size
    if config.num_experts and config.shared_expert_intermediate_size:
        sizes["shared_expert_intermediate_size"] = config.shared_expert_intermediate_size
    for name, size in sizes.items():
        assert size is not None  # ByteModelConfig sets it
        if size % tensor:
            raise TrainError(f"parallel.tensor: {tensor} does not divide model.{name} ({size}).")
    for name, is_refused, reason in (
        ("qk_norm_per_head: false", not config.qk_norm_per_head, "such a norm spans the heads of all ranks"),
        ("xpos_learnable_scale", config.xpos_learnable_scale, "its gradient is a sum over the heads of all ranks"),
        ("attention_dropout", config.attention_dropout > 0, "heads of different ranks would drop the same weights"),
    ):
        if is_refused:
            raise TrainError(f"parallel.tensor ({tensor}) cannot be used with model.{name}: {reason}.")

"""What each of the ranks that serve one model holds of it, from the table of a layer's parts; pure arithmetic.

Query heads, inner widths, experts and the vocabulary are divided (Shoeybi et al. 2019, "Megatron-LM"). A rank has whole
groups of query heads with their key-value head; where there are fewer key-value heads than ranks, several ranks have a
copy of one. Inner widths are divided in whole groups of 32 channels where there are enough of them, as kernels and
quantized matrices want them. Where the ranks cannot have equally many of something, some have one more than others, the
first rank among them.
"""

from dataclasses import dataclass
from functools import cached_property

from stellarbyte.config import ByteModelConfig
from stellarbyte.model.parts import Part, layer_parts, module_path, parameter_name

Index = tuple[slice, ...]  # of the first dimensions of a parameter
CHANNELS = 32
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class UndividedError(ValueError):
    """A model that so many ranks cannot divide; str() is one sentence."""


def span(total: int, rank: int, ranks: int) -> range:
    """The numbers of 0..total that belong to a rank: neighbours, and at most one more than other ranks have. No rank
    has more than the first."""
    start, stop = (-(-total * number // ranks) for number in (rank, rank + 1))
    return range(start, stop)


def own_width(total: int, rank: int, ranks: int) -> int:
    """How many of a layer's inner channels a rank has."""
    unit = CHANNELS if total % CHANNELS == 0 and total // CHANNELS >= ranks else 1
    return unit * len(span(total // unit, rank, ranks))


def refuse_undivided(config: ByteModelConfig, ranks: int) -> None:
    """Raise UndividedError for a model that `ranks` ranks cannot divide."""
    num_heads, num_kv_heads = _num_heads(config)
    if num_kv_heads < ranks and (ranks % num_kv_heads or num_heads % ranks):
        raise UndividedError(
            f"{ranks} ranks cannot divide {num_heads} query heads (num_attention_heads) with {num_kv_heads} key-value"
            f" heads (num_key_value_heads); possible are {_listed(possible_ranks(config, 2 * ranks))}"
        )
    sizes = {"vocab_size": config.vocab_size}
    if None in config.expert_layers:
        sizes["intermediate_size"] = config.intermediate_size
    if config.num_experts:
        sizes["num_experts"] = config.num_experts
        if config.shared_expert_intermediate_size:
            sizes["shared_expert_intermediate_size"] = config.shared_expert_intermediate_size
    for name, size in sizes.items():
        if size < ranks:
            raise UndividedError(f"{ranks} ranks cannot divide {name} ({size})")


def possible_ranks(config: ByteModelConfig, most: int) -> list[int]:
    """The numbers of ranks up to `most` that can divide a model's heads; 1 is always one."""
    num_heads, num_kv_heads = _num_heads(config)
    return [n for n in range(1, most + 1) if n <= num_kv_heads or not (n % num_kv_heads or num_heads % n)]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Of one parameter, the part of a rank.

    Attributes: is_zero: the rank has zeros instead, since another rank adds this bias to the sum over ranks.
    """

    index: Index
    is_zero: bool = False


@dataclass(frozen=True, kw_only=True)
class RankShare:
    """The share of one rank; `config` is that of the whole model, which `refuse_undivided` has accepted."""

    config: ByteModelConfig
    rank: int
    ranks: int

    @cached_property
    def own_config(self) -> ByteModelConfig:
        """The config of the rank's own attention and MLPs. Its router and its vocabulary are the whole model's."""
        return self._config_of(self.rank)

    @property
    def vocabulary(self) -> range:
        """Token ids of the rank's rows of embedding and head."""
        return span(self.config.vocab_size, self.rank, self.ranks)

    @property
    def experts(self) -> range:
        """The rank's experts of every layer that has some."""
        return span(self.config.num_experts, self.rank, self.ranks)

    @property
    def kv_copies(self) -> int:
        """Ranks that hold the same key-value head."""
        return max(1, self.ranks // _num_heads(self.config)[1])

    @property
    def is_even(self) -> bool:
        """Whether all ranks hold equally many heads."""
        return self._config_of(self.ranks - 1).num_attention_heads == self._config_of(0).num_attention_heads

    def piece(self, part: Part, layer: int) -> slice:
        """The rank's numbers along the axis that divides a part; all of them for a part without a cut."""
        axis = self._axis(part)
        if axis is None:
            return slice(None)
        if part.cut == "experts":
            return slice(self.experts.start, self.experts.stop)
        whole = part.shape(self.config, layer)[axis]
        sizes = [part.shape(config, layer)[axis] for config in self._configs]
        own = sizes[self.rank]
        start = sum(sizes[: self.rank])
        if sum(sizes) > whole:  # key-value heads with copies
            start = self.rank * whole // self.ranks // own * own
        return slice(start, start + own)

    def pieces(self) -> dict[str, Piece]:
        """The rank's piece of every stored parameter, by its full name."""
        rows = Piece(index=(slice(self.vocabulary.start, self.vocabulary.stop),))
        found = {EMBEDDING: rows}
        for layer in range(self.config.num_hidden_layers):
            for part in layer_parts(self.config, layer):
                piece, axis = self.piece(part, layer), self._axis(part)
                index = () if axis is None else (*[slice(None)] * axis, piece)
                found[module_path(layer, parameter_name(part))] = Piece(index=index)
                if part.has_bias(self.config, layer):
                    is_summed = part.cut == "in"
                    bias = Piece(index=() if is_summed else index, is_zero=is_summed and self.rank > 0)
                    found[module_path(layer, f"{part.name}.bias")] = bias
        whole = Piece(index=())
        found["model.norm.weight"] = whole
        if self.config.xpos_learnable_scale:
            found["model.rotary.raw_decay"] = whole
        if not self.config.tie_word_embeddings:
            found[HEAD] = rows
        return found

    def _axis(self, part: Part) -> int | None:
        """The axis of a part's parameter that ranks divide."""
        if part.reads_heads and not self.config.qk_norm_per_head:
            return 0  # a norm over all heads
        return None if part.cut is None else {"out": 0, "in": 1, "experts": 0}[part.cut]

    @cached_property
    def _configs(self) -> list[ByteModelConfig]:
        return [self._config_of(rank) for rank in range(self.ranks)]

    def _config_of(self, rank: int) -> ByteModelConfig:
        config, ranks = self.config, self.ranks
        num_heads, num_kv_heads = _num_heads(config)
        own_kv_heads, own_heads = 1, num_heads // ranks
        if num_kv_heads >= ranks:
            own_kv_heads = len(span(num_kv_heads, rank, ranks))
            own_heads = own_kv_heads * (num_heads // num_kv_heads)
        changes = {"num_attention_heads": own_heads, "num_key_value_heads": own_kv_heads}
        if None in config.expert_layers:
            changes["intermediate_size"] = own_width(config.intermediate_size, rank, ranks)
        if config.shared_expert_intermediate_size:
            changes["shared_expert_intermediate_size"] = own_width(config.shared_expert_intermediate_size, rank, ranks)
        return ByteModelConfig.from_dict(config.to_dict() | changes)


def _num_heads(config: ByteModelConfig) -> tuple[int, int]:
    """Query heads and key-value heads."""
    assert config.num_key_value_heads is not None  # ByteModelConfig sets it
    return config.num_attention_heads, config.num_key_value_heads


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))

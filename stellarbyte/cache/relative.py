"""The cache of `generate` and `forward_step`: a transformers Cache with unrotated keys.

Keys are stored unrotated with their positions and rotated when read, relative to the queries that read them
(as a block of the serving cache, which has several keys). So windows and sinks drop keys without changing
the others, and no number grows with the absolute position.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from stellarbyte.cache.key_pruning import KeyPruning
from stellarbyte.cache.memory import Memory
from stellarbyte.config import ByteModelConfig

# B sequences, S kept keys, T new tokens, K key/value heads, D head dim


class RelativeCacheLayer(CacheLayerMixin):
    """Keys [B, K, S, D], values alike and positions [B, S] of one layer; padding has position -1.

    The window decides which keys are dropped, not which of the others a query sees.
    """

    is_sliding = False

    def __init__(self, window: int | None, sink_tokens: int) -> None:
        super().__init__()
        self.window = window
        self.sink_tokens = sink_tokens if window is not None else 0
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None
        self.num_seen = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        batch = key_states.shape[0]
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.positions = torch.empty(batch, 0, dtype=torch.long, device=key_states.device)
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        num_memory: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append T tokens; returns the keys and values that they may see. `positions` [B, T]; None: consecutive.

        The first `num_memory` tokens are those of a memory: visible, but not counted as seen by this cache.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None and self.positions is not None
        self._drop_unseen()
        batch, _, length, _ = key_states.shape
        if positions is None:
            positions = torch.arange(self.num_seen, self.num_seen + length, device=key_states.device).expand(batch, -1)
        self.keys = torch.cat((self.keys, key_states), dim=2)
        self.values = torch.cat((self.values, value_states), dim=2)
        self.positions = torch.cat((self.positions, positions), dim=-1)
        self.num_seen += length - num_memory
        return self.keys, self.values

    def _drop_unseen(self) -> None:
        """Drop keys that no later query can see, once they outnumber the rest, which amortises the copying."""
        assert self.positions is not None
        kept = self.positions.shape[1]
        if self.window is None or kept < 2 * (self.window + self.sink_tokens):
            return
        self.keep(self.visible_later())

    def visible_later(self) -> torch.Tensor:
        """Indices of the keys that later queries can see, in order."""
        assert self.positions is not None
        index = torch.arange(self.positions.shape[1], device=self.positions.device)
        if self.window is None:
            return index
        sink = ((self.positions >= 0) & (self.positions < self.sink_tokens)).any(dim=0)
        return index[sink | (index > len(index) - self.window)]

    def keep(self, index: torch.Tensor) -> None:
        assert self.keys is not None and self.values is not None and self.positions is not None
        self.keys, self.values = self.keys.index_select(2, index), self.values.index_select(2, index)
        self.positions = self.positions.index_select(1, index)

    def _select_rows(self, rows: torch.Tensor) -> None:
        if self.is_initialized:
            assert self.keys is not None and self.values is not None and self.positions is not None
            rows = rows.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
            self.positions = self.positions.index_select(0, rows)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            assert self.keys is not None
            self._select_rows(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def reset(self) -> None:
        self.keys = None
        self.values = None
        self.positions = None
        self.is_initialized = False
        self.num_seen = 0

    def get_seq_length(self) -> int:
        return self.num_seen

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The older name of `get_max_length`, still abstract in some supported releases of transformers."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        kept = 0 if self.positions is None else self.positions.shape[-1]
        return kept + query_length, 0


class PrunedCacheLayer(RelativeCacheLayer):
    """As its base, but every key head keeps the keys that it has attended to most: positions are [B, K, S].

    Attention gives the weights that each key got to `add_attention`, and calls `prune` when it is done.
    """

    def __init__(self, window: int | None, sink_tokens: int, pruning: KeyPruning) -> None:
        super().__init__(window, sink_tokens)
        self.pruning = pruning
        self.attention: torch.Tensor | None = None  # [B, K, S] float32, summed over queries and their heads
        self.num_read = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        none = key_states[:, :, :0, 0]
        self.positions, self.attention = none.long(), none.float()
        self.num_read = 0

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        num_memory: int = 0,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, heads, length, _ = key_states.shape
        if positions is None:
            positions = torch.arange(self.num_seen, self.num_seen + length, device=key_states.device).expand(batch, -1)
        positions_BKT = positions[:, None].expand(-1, heads, -1)
        keys, values = super().update(key_states, value_states, positions=positions_BKT, num_memory=num_memory)
        assert self.attention is not None
        self.attention = torch.nn.functional.pad(self.attention, (0, length))
        self.num_read += length
        return keys, values

    def _drop_unseen(self) -> None:
        """`prune` has dropped them."""

    def add_attention(self, weights_BKS: torch.Tensor) -> None:
        """Add the weights of some queries on the first S keys."""
        assert self.attention is not None
        self.attention[..., : weights_BKS.shape[-1]] += weights_BKS

    def prune(self) -> None:
        """Keep the newest keys, the sinks and, of the others that later queries can see, those with most attention."""
        assert self.keys is not None and self.values is not None
        assert self.positions is not None and self.attention is not None
        kept = self.pruning.kept(self.attention, self.positions, self.num_read, self.window, self.sink_tokens)
        if kept is None:
            return
        of_vectors = kept[..., None].expand(-1, -1, -1, self.keys.shape[-1])
        self.keys, self.values = self.keys.gather(2, of_vectors), self.values.gather(2, of_vectors)
        self.positions, self.attention = self.positions.gather(2, kept), self.attention.gather(2, kept)

    def _select_rows(self, rows: torch.Tensor) -> None:
        super()._select_rows(rows)
        if self.attention is not None:
            self.attention = self.attention.index_select(0, rows.to(self.attention.device))

    def reset(self) -> None:
        super().reset()
        self.attention = None


class RelativeCache(Cache):
    """One `RelativeCacheLayer` for each layer; pass it as `past_key_values`.

    Args:
        alike: all layers keep the same tokens; if one layer has no window, no token is dropped.
        memory: of the tokens before the first; the first forward takes its keys and values, every forward adds its
            tokens to it.
        pruning: which keys are dropped for want of attention; None: none.

    Raises:
        ValueError: the pruning would drop sinks.
    """

    def __init__(
        self,
        config: ByteModelConfig,
        alike: bool = False,
        *,
        memory: Memory | None = None,
        pruning: KeyPruning | None = None,
    ) -> None:
        windows = config.windows
        if alike and not all(windows):
            windows = (None,) * len(windows)
        if pruning is None or not pruning.drops_anything:
            layers = [RelativeCacheLayer(window, config.sink_tokens) for window in windows]
        else:
            if any(windows):
                pruning.refuse_sinks(config.sink_tokens)
            layers = [PrunedCacheLayer(window, config.sink_tokens, pruning) for window in windows]
        super().__init__(layers=layers)
        self.memory = memory
        self.start = 0  # position of the first token after the memory
        self._memory_seen = 0  # by the memory before that token

    def attach(self, memory: Memory | None) -> None:
        """Use this memory from the first forward on; None: the one it has.

        Raises:
            ValueError: the cache has tokens, but not of this memory, or the memory has changed since their forward.
        """
        num_seen = self.get_seq_length()
        if memory is not None and memory is not self.memory:
            if num_seen:
                raise ValueError(f"memory must be given with a cache's first call; this cache has {num_seen} tokens")
            self.memory = memory
        if self.memory is None:
            return
        if num_seen == 0:
            self.start, self._memory_seen = self.memory.next_position, self.memory.num_seen
        elif self.memory.num_seen != self._memory_seen + num_seen:
            raise ValueError("the memory has changed since the cache's last call; start with a new cache")

    def reset(self) -> None:
        """Drop every key; the memory stays, and the next call reads it."""
        super().reset()
        self.start = 0

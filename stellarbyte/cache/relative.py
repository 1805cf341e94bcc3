"""The cache of `generate` and `forward_step`: a transformers Cache with unrotated keys.

Keys are stored unrotated with their positions and rotated when read, relative to the queries that read them
(as a block of the serving cache, which has several keys). So windows and sinks drop keys without changing
the others, and no number grows with the absolute position.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

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
        self, key_states: torch.Tensor, value_states: torch.Tensor, *, positions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append T tokens; returns the keys and values that they may see. `positions` [B, T]; None: consecutive."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None and self.positions is not None
        self._drop_unseen()
        batch, _, length, _ = key_states.shape
        if positions is None:
            positions = torch.arange(self.num_seen, self.num_seen + length, device=key_states.device).expand(batch, -1)
        self.keys = torch.cat((self.keys, key_states), dim=2)
        self.values = torch.cat((self.values, value_states), dim=2)
        self.positions = torch.cat((self.positions, positions), dim=1)
        self.num_seen += length
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
        kept = 0 if self.positions is None else self.positions.shape[1]
        return kept + query_length, 0


class RelativeCache(Cache):
    """One `RelativeCacheLayer` for each layer; pass it as `past_key_values`.

    `alike`: all layers keep the same tokens; if one layer has no window, no token is dropped.
    """

    def __init__(self, config: ByteModelConfig, alike: bool = False) -> None:
        windows = config.windows
        if alike and not all(windows):
            windows = (None,) * len(windows)
        super().__init__(layers=[RelativeCacheLayer(window, config.sink_tokens) for window in windows])

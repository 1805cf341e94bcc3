"""Memory: hidden states of earlier segments, which attention reads as context (Dai et al. 2019, "Transformer-XL").

Distances are those of one long sequence, but no row has a stored position: the newest rows end where the next token
begins, so a stream of any length has small positions (numerics: "Memory").
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from stellarbyte.cache.fingerprint import fingerprint
from stellarbyte.config import ByteModelConfig

# B sequences, M held rows, T new rows, C hidden size

FORMAT = "stellarbyte-memory-1"


class Memory:
    """Every layer's inputs for the newest tokens of B sequences, read by the attention of the next segment.

    Attention projects keys and values from these rows as from the segment's own hidden states; queries, and so
    outputs, are the segment's alone. A layer with a window sees what its window allows, and the model's sinks, which
    are held besides the newest rows; a layer without one sees every row.
    `ByteTransformer.forward(memory=...)` reads the memory and then adds its own tokens to it.

    Args:
        config: of the model.
        mem_len: most rows held for each layer, without the sinks, in tokens.
        ratio: 1: the oldest row leaves for each one that comes. Less: ceil(ratio · mem_len) rows leave at a time.
        detach: hold rows without their graph, so that gradients end at the present segment.

    Raises:
        ValueError: mem_len or ratio is out of range, or the model has longrope.
    """

    def __init__(self, config: ByteModelConfig, mem_len: int, *, ratio: float | int = 1.0, detach: bool = True) -> None:
        if mem_len < 1:
            raise ValueError(f"mem_len ({mem_len}) must be at least 1")
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio ({ratio}) must be greater than 0 and at most 1")
        assert config.rope_parameters is not None  # ByteModelConfig sets it
        if config.rope_parameters["rope_type"] == "longrope":
            raise ValueError("a memory cannot hold states of a model with longrope, whose rotations change with length")
        self.mem_len = mem_len
        self.ratio = ratio
        self.detach = detach
        self.hidden_size = config.hidden_size
        windows = config.windows
        self._sinks = [0 if window is None else config.sink_tokens for window in windows]
        # Up to here positions are counted; beyond it no score changes: the window caps the distance of the sinks.
        reach = max(self._sinks) + max(window or 0 for window in windows) if any(self._sinks) else 0
        self._max_position = reach + mem_len
        self._device: torch.device | None = None
        self._dtype: torch.dtype | None = None
        self._rows: list[torch.Tensor | None] = []
        self._num_seen: list[int] = []
        self.clear()

    def clear(self) -> None:
        """Forget every row: the next token begins a sequence."""
        self._rows = [None] * len(self._sinks)
        self._num_seen = [0] * len(self._sinks)

    def update(self, layer: int, hidden: torch.Tensor) -> None:
        """Add the newest T rows of one layer, [B, T, C], its inputs before the norm.

        Raises:
            ValueError: another shape than the rows held, or the model's width.
        """
        held = self._rows[layer]
        if hidden.dim() != 3 or hidden.shape[2] != self.hidden_size:
            raise ValueError(f"hidden has shape {list(hidden.shape)}, expected [batch, tokens, {self.hidden_size}]")
        if held is not None and held.shape[0] != hidden.shape[0]:
            raise ValueError(f"hidden has {hidden.shape[0]} sequences, but the memory holds {held.shape[0]}")
        new = hidden.detach() if self.detach else hidden
        new = new.to(device=self._device or new.device, dtype=self._dtype or new.dtype)
        old = new[:, :0] if held is None else held.to(new)
        num_old, total = old.shape[1], old.shape[1] + new.shape[1]
        sinks = min(self._sinks[layer], total)  # never dropped, so they are the first rows
        start = sinks + self._num_dropped(total - sinks)
        spans = ((0, sinks), (start, total))
        pieces = [old[:, a:b] for a, b in spans] + [new[:, max(a - num_old, 0) : max(b - num_old, 0)] for a, b in spans]
        first_old, rest_old, first_new, rest_new = pieces
        self._rows[layer] = torch.cat((first_old, first_new, rest_old, rest_new), dim=1)
        self._num_seen[layer] += new.shape[1]

    def _num_dropped(self, num_rows: int) -> int:
        excess = num_rows - self.mem_len
        step = 1 if self.ratio == 1 else math.ceil(self.ratio * self.mem_len - 1e-9)  # 0.07 · 100 is above 7
        return math.ceil(excess / step) * step if excess > 0 else 0

    def update_all(self, hiddens: Sequence[torch.Tensor]) -> None:
        """Add the newest rows of every layer; `hiddens` as in `update`, one for each layer.

        Raises:
            ValueError: another number of layers, or as `update`.
        """
        if len(hiddens) != len(self._rows):
            raise ValueError(f"hiddens has {len(hiddens)} layers, but the memory has {len(self._rows)}")
        for layer, hidden in enumerate(hiddens):
            self.update(layer, hidden)

    def get(self, layer: int) -> torch.Tensor | None:
        """The rows of one layer, [B, M, C]: its sinks, then the newest ones in order; None: none yet."""
        return self._rows[layer]

    def positions(self, layer: int) -> torch.Tensor:
        """[M] positions of the rows of one layer, counted so that the next token has `next_position`."""
        held = self._rows[layer]
        if held is None:
            return torch.empty(0, dtype=torch.long)
        sinks = min(self._sinks[layer], held.shape[1])
        end, device = self.next_position, held.device
        newest = torch.arange(end - (held.shape[1] - sinks), end, device=device)
        return torch.cat((torch.arange(sinks, device=device), newest))

    @property
    def next_position(self) -> int:
        """Position of the token after the memory: the number of tokens seen, or the largest that changes a score."""
        return min(self.num_seen, self._max_position)

    @property
    def num_seen(self) -> int:
        """Tokens added since the last `clear`, dropped ones included.

        Raises:
            ValueError: `update` gave the layers different numbers of tokens.
        """
        if len(set(self._num_seen)) > 1:
            raise ValueError(f"the memory's layers have seen different numbers of tokens: {self._num_seen}")
        return self._num_seen[0]

    @property
    def batch_size(self) -> int | None:
        """Number of sequences; None while the memory is empty."""
        return next((rows.shape[0] for rows in self._rows if rows is not None), None)

    @property
    def memory_size(self) -> int:
        """Bytes of the rows held."""
        return sum(rows.numel() * rows.itemsize for rows in self._rows if rows is not None)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Hold all rows, also future ones, on this device and in this dtype; None: as before. Returns the memory.

        Attention reads them on the model's device and in the model's dtype.
        """
        self._device = self._device if device is None else torch.device(device)
        self._dtype = self._dtype if dtype is None else dtype
        self._rows = [None if rows is None else rows.to(device=device, dtype=dtype) for rows in self._rows]
        return self

    def __repr__(self) -> str:
        rows = [0 if held is None else held.shape[1] for held in self._rows]
        return (
            f"Memory(layers={len(rows)}, mem_len={self.mem_len}, ratio={self.ratio:g}, detach={self.detach}, "
            f"batch_size={self.batch_size}, rows={max(rows)}, num_seen={max(self._num_seen)}, bytes={self.memory_size})"
        )

    def save(self, path: str | os.PathLike[str], model: nn.Module) -> None:
        """Write the memory as a safetensors file, which names the weights that it is from.

        Args:
            model: the one that made the memory; its weights are read to take their fingerprint.

        Raises:
            ValueError: the layers have seen different numbers of tokens.
            OSError: the file cannot be written.
        """
        target = Path(path)
        metadata = {
            "format": FORMAT,
            "model": fingerprint(model),
            "mem_len": str(self.mem_len),
            "ratio": repr(self.ratio),
            "num_seen": str(self.num_seen),
        }
        rows = {f"layers.{layer}": held.detach().cpu() for layer, held in enumerate(self._rows) if held is not None}
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            save_file(rows, partial, metadata)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module, *, detach: bool = True) -> Self:
        """A memory that `save` wrote, on the CPU.

        Args:
            model: the one to read it, with the weights, config and active adapters of the one that made it.

        Raises:
            ValueError: the file cannot be read, is no memory, or is that of another model.
        """
        config = model.config
        assert isinstance(config, ByteModelConfig)
        try:
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, Any] = file.metadata() or {}
                rows = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not a memory: its metadata lacks the format {FORMAT}")
        if metadata.get("model") != fingerprint(model):
            raise ValueError(f"{path} was made by another model: its hidden states mean nothing to these weights")
        try:
            memory = cls(config, int(metadata["mem_len"]), ratio=json.loads(metadata["ratio"]), detach=detach)
            memory._adopt(rows, int(metadata["num_seen"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is corrupt: {error}") from error
        return memory

    def _adopt(self, rows: dict[str, torch.Tensor], num_seen: int) -> None:
        names = [f"layers.{layer}" for layer in range(len(self._rows))] if num_seen else []
        if rows.keys() != set(names):
            raise ValueError(f"it holds {sorted(rows)}, expected {names}")
        for name, sinks in zip(names, self._sinks, strict=False):
            batch, num_rows, width = rows[name].shape
            most = min(num_seen, sinks + self.mem_len)
            if (batch, width) != (rows[names[0]].shape[0], self.hidden_size) or not min(1, most) <= num_rows <= most:
                raise ValueError(f"{name} has the shape {list(rows[name].shape)}")
        if names:
            self._rows = [rows[name] for name in names]
        self._num_seen = [num_seen] * len(self._rows)

"""Adapters in the layout of the serving kernels: one row of numbers for each slot.

A slot holds an adapter compactly, by layers; within a layer first every A [r, in], then every scale · Bᵀ [r, out], then
every d [out] of DoRA, all in the order of `Projections`. So the A's of projections that share an input are adjacent,
and one product computes all of them. B includes `alpha / r`; a request adds its own scale.

With DoRA, f = m / ‖W + scale · B A‖ by rows is computed when an adapter is packed; B includes it, and d = f - 1. So the
change of the output, d ⊙ W x + Bᵀ(A x), is linear: a request's scale multiplies it, and those of a mix add up.
"""

import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from stellarbyte.config import ByteModelConfig
from stellarbyte.lora.pinned_copies import PinnedCopies
from stellarbyte.lora.untouched_memory import large_array, untouched_memory
from stellarbyte.model.parts import Part, adaptable_modules, linears_by_input, model_parts, module_path

# S slots, L layers, P projections, F numbers of a slot, r rank

Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]
Shape = tuple[int, int]  # (out, in)
_NO_SHAPE = (0, 0)
REPLACEABLE = HEAD, EMBEDDING = "lm_head", "model.embed_tokens"  # what adapters may replace (modules_to_save)
NOTHING: Mapping[str, torch.Tensor] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Projections:
    """The linears of a model's layers, numbered so that those with a common input are neighbours."""

    names: tuple[str, ...]  # P
    shapes: tuple[tuple[Shape, ...], ...]  # [L][P]; (0, 0): the layer has no such linear
    shared_inputs: Mapping[str, slice]  # input → the projections that read it

    @classmethod
    def of(cls, config: ByteModelConfig) -> "Projections":
        groups = linears_by_input(model_parts(config))
        parts = [part for group in groups.values() for part in group]
        ends = list(accumulate(len(group) for group in groups.values()))
        return cls(
            names=tuple(part.name for part in parts),
            shapes=tuple(
                tuple(_shape(part, config, layer) for part in parts) for layer in range(config.num_hidden_layers)
            ),
            shared_inputs={
                name: slice(end - len(group), end) for (name, group), end in zip(groups.items(), ends, strict=True)
            },
        )

    def input_width(self, layer: int, shared: slice) -> int:
        """The width of a shared input in a layer."""
        return max(width for _, width in self.shapes[layer][shared])

    def modules(self) -> Iterator[tuple[int, int, str]]:
        """Layer, number and full name of every projection that exists."""
        for layer, shapes in enumerate(self.shapes):
            for number, name in enumerate(self.names):
                if shapes[number] != _NO_SHAPE:
                    yield layer, number, module_path(layer, name)


def _shape(part: Part, config: ByteModelConfig, layer: int) -> Shape:
    if not part.exists(config, layer):
        return _NO_SHAPE
    out, width = part.shape(config, layer)
    return out, width


@dataclass(frozen=True, kw_only=True)
class PackedAdapter:
    """An adapter in a slot's layout, in CPU memory."""

    numbers: torch.Tensor  # [n ≤ F], in the bank's dtype
    ranks_LP: Integers  # 0: no adapter for that projection
    has_factors_LP: Booleans  # DoRA's
    replaced: Mapping[str, torch.Tensor] = field(
        default_factory=dict
    )  # HEAD, EMBEDDING → [V, C] the adapter's matrix less the base's

    @property
    def num_bytes(self) -> int:
        return self.numbers.nbytes + sum(matrix.nbytes for matrix in self.replaced.values())

    def is_finite(self) -> bool:
        return all(map(is_finite, (self.numbers, *self.replaced.values())))


def is_finite(numbers: torch.Tensor) -> bool:
    """Whether all numbers are finite. A finite sum, which needs no copy, is enough; a sum may overflow."""
    return bool(numbers.sum().isfinite()) or bool(numbers.isfinite().all())


def pack_adapter(
    weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    scales: Mapping[str, float],
    config: ByteModelConfig,
    dtype: torch.dtype,
    factors: Mapping[str, torch.Tensor] = NOTHING,
    replaced: Mapping[str, torch.Tensor] = NOTHING,
) -> PackedAdapter:
    """Pack an adapter into a slot's layout.

    Args:
        weights: module name → (A [r, in], B [out, r]); names and shapes are those of `adaptable_modules`.
        scales: module name → alpha / r of that module.
        factors: module name → f [out] of DoRA.
        replaced: see `PackedAdapter`; in `dtype`.
    """
    assert all(matrix.dtype == dtype for matrix in replaced.values())
    projections = Projections.of(config)
    ranks_LP = np.zeros((config.num_hidden_layers, len(projections.names)), dtype=np.int64)
    has_factors_LP = np.zeros(ranks_LP.shape, dtype=np.bool_)
    adapted = [place for place in projections.modules() if place[2] in weights]
    for layer, projection, name in adapted:
        ranks_LP[layer, projection] = len(weights[name][0])
        has_factors_LP[layer, projection] = name in factors
    a_LP, b_LP, d_LP, total = offsets(ranks_LP, has_factors_LP, projections)
    numbers = large_array(total, dtype)
    bits = _bits(numbers)
    for layer, projection, name in adapted:
        out, width = projections.shapes[layer][projection]
        a, b = weights[name]
        rank, a_start, b_start = len(a), a_LP[layer, projection], b_LP[layer, projection]
        bits[a_start : a_start + rank * width].reshape(rank, width)[:] = _bits(a if a.dtype == dtype else a.to(dtype))
        factor = factors.get(name)
        if factor is not None:
            numbers[d_LP[layer, projection] :][:out] = factor - 1
            b = b.float() * factor.float()[:, None]
        bits[b_start : b_start + rank * out].reshape(rank, out)[:] = _bits(_scaled(b, scales[name], dtype)).T
    return PackedAdapter(numbers=numbers, ranks_LP=ranks_LP, has_factors_LP=has_factors_LP, replaced=replaced)


def _scaled(matrix: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """matrix · scale, computed in float32 and rounded once."""
    if matrix.dtype == dtype:
        return matrix if scale == 1 else matrix * scale
    return (matrix.float() * scale).to(dtype)


def _bits(numbers: torch.Tensor) -> npt.NDArray[np.generic]:
    """A view as integers: numpy has no bfloat16. Numpy transposes twice as fast as torch, and takes views without
    releasing the GIL, so several reading threads do not wait for it."""
    return numbers.view({2: torch.int16, 4: torch.int32}[numbers.element_size()]).numpy()


def matrix_at(numbers: torch.Tensor, offset: int, rank: int, width: int) -> torch.Tensor:
    """[rank, width]: a view of the A or Bᵀ, or of some of its rows, that begins at an offset of a slot's numbers."""
    return numbers[offset : offset + rank * width].view(rank, width)


def offsets(
    ranks_LP: Integers, has_factors_LP: Booleans, projections: Projections
) -> tuple[Integers, Integers, Integers, int]:
    """The offset of each A, each Bᵀ and each d, and the end of the last one."""
    out_LP, in_LP = np.moveaxis(np.array(projections.shapes, dtype=np.int64), -1, 0)
    sizes_L3P: Integers = np.stack([ranks_LP * in_LP, ranks_LP * out_LP, has_factors_LP * out_LP], 1)
    ends = np.cumsum(sizes_L3P, dtype=np.int64).reshape(sizes_L3P.shape)
    a_LP, b_LP, d_LP = np.moveaxis(ends - sizes_L3P, 1, 0)
    return a_LP.copy(), b_LP.copy(), d_LP.copy(), int(ends[-1, -1, -1])


class BankTables(NamedTuple):
    """Offsets and ranks of the adapters' parts: int64 tensors on the bank's device, at fixed addresses.

    Offsets count numbers from the start of the slot's row; they are undefined where the rank is 0.
    """

    ranks_SLP: torch.Tensor
    a_offsets_SLP: torch.Tensor
    b_offsets_SLP: torch.Tensor
    d_offsets_SLP: torch.Tensor  # -1: no DoRA
    replaced_offsets_S2: torch.Tensor  # from the bank's first number to what is replaced; 0: nothing


class LoraBank:
    """The adapters that a step can use. Slot 0 is the null adapter: it has rank 0 everywhere.

    A slot may be filled or cleared by any thread while steps run, as long as no running step uses it; one is filled at
    a time. On a CUDA device the thread that launches steps does so ahead: it takes a `fence` when the last step that
    uses a slot is launched, and `fill` waits for that; and it calls `clear` itself, on the steps' stream.

    Args:
        num_slots: without slot 0.
        max_rank: largest rank of any projection of an adapter.
    """

    def __init__(
        self,
        config: ByteModelConfig,
        num_slots: int = 0,
        max_rank: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.config = config
        self.num_slots = num_slots
        self.max_rank = max_rank
        self.dtype = dtype
        self.projections = Projections.of(config)
        # A power of two that divides where each A and Bᵀ begins in its slot, which are sums of ranks times widths.
        self.alignment = math.gcd(
            16, *(width for shapes in self.projections.shapes for shape in shapes for width in shape)
        )
        shape = (num_slots + 1, config.num_hidden_layers, len(self.projections.names))
        self.ranks_SLP, self.a_offsets_SLP, self.b_offsets_SLP = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        self.d_offsets_SLP = np.full(shape, -1, dtype=np.int64)  # -1: no DoRA
        self._replaced_offsets_S2: Integers = np.zeros((num_slots + 1, len(REPLACEABLE)), dtype=np.int64)
        host_tables = self.ranks_SLP, self.a_offsets_SLP, self.b_offsets_SLP, self.d_offsets_SLP
        self.tables = self._host_tables = BankTables(*map(torch.from_numpy, (*host_tables, self._replaced_offsets_S2)))
        self.slots_beyond_plain: set[int] = set()  # of adapters with DoRA, a head or an embedding
        self.replaced: dict[int, Mapping[str, torch.Tensor]] = {}  # slot → as in `PackedAdapter`, on the bank's device
        full = 1 + sum(max_rank * (out + width) + out for out, width in adaptable_modules(config).values())
        bytes_per_slot = -(-full * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        count = (num_slots + 1) * bytes_per_slot // dtype.itemsize
        self._memory: mmap.mmap | None = None
        self._copies: PinnedCopies | None = None
        if torch.device(device).type == "cpu":
            self._memory = untouched_memory((num_slots + 1) * bytes_per_slot)
            numbers = torch.frombuffer(self._memory, dtype=dtype, count=count)
        else:
            numbers = torch.zeros(count, dtype=dtype, device=device)
            self.tables = BankTables(*(table.to(device) for table in self._host_tables))
            self._copies = PinnedCopies(numbers.device) if num_slots else None
        self._bytes_per_slot = bytes_per_slot
        self.numbers_SF = numbers.view(num_slots + 1, -1)

    def fence(self) -> torch.cuda.Event | None:
        """An event after all work now in the calling thread's current stream, for `fill` to wait for."""
        return None if self._copies is None else torch.cuda.current_stream(self.numbers_SF.device).record_event()

    def fill(self, slot: int, adapter: PackedAdapter, fence: torch.cuda.Event | None = None) -> None:
        """Copy an adapter into a slot, in place of its previous one; returns when the copy is complete.

        Args:
            fence: a CUDA device writes the slot only after it; None: after the work now in this thread's stream.

        Raises:
            torch.OutOfMemoryError: the device has no room for the adapter's head or embedding.
        """
        assert 1 <= slot <= self.num_slots
        after = self.fence() if fence is None else fence
        if self._copies is None:
            self.clear(slot)
        elif after is not None and slot in self.replaced:
            after.synchronize()  # what the steps before it read goes back to the allocator
        replaced = self._make_replaced(slot, adapter)
        if self._copies is None:
            self.numbers_SF[slot, : len(adapter.numbers)].copy_(adapter.numbers)
        starts = offsets(adapter.ranks_LP, adapter.has_factors_LP, self.projections)
        self.a_offsets_SLP[slot], self.b_offsets_SLP[slot], d_LP, _ = starts
        self.d_offsets_SLP[slot] = np.where(adapter.has_factors_LP, d_LP, -1)
        is_plain = not (adapter.replaced or adapter.has_factors_LP.any())
        (self.slots_beyond_plain.discard if is_plain else self.slots_beyond_plain.add)(slot)
        self.ranks_SLP[slot] = adapter.ranks_LP
        if self._copies is None:
            for source, target in replaced:
                target.copy_(source)
        else:
            numbers = (adapter.numbers, self.numbers_SF[slot, : len(adapter.numbers)])
            tables = [(host[slot], there[slot]) for host, there in zip(self._host_tables, self.tables, strict=True)]
            self._copies.run([numbers, *replaced, *tables], after=after)

    def _make_replaced(self, slot: int, adapter: PackedAdapter) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Memory on the device for what an adapter replaces; the matrices to copy there."""
        self._replaced_offsets_S2[slot] = 0
        self.replaced.pop(slot, None)
        device, first = self.numbers_SF.device, self.numbers_SF.data_ptr()
        made = {name: torch.empty_like(matrix, device=device) for name, matrix in adapter.replaced.items()}
        for name, matrix in made.items():
            offset = (matrix.data_ptr() - first) // self.dtype.itemsize
            self._replaced_offsets_S2[slot, REPLACEABLE.index(name)] = offset
        if made:
            self.replaced[slot] = made
        return [(adapter.replaced[name], matrix) for name, matrix in made.items()]

    def clear(self, slot: int) -> None:
        """Make a slot's adapter the null adapter; on a CPU its memory returns to the system."""
        assert 1 <= slot <= self.num_slots
        self.ranks_SLP[slot], self.d_offsets_SLP[slot] = 0, -1
        self.slots_beyond_plain.discard(slot)
        self._replaced_offsets_S2[slot] = 0
        for matrix in self.replaced.pop(slot, {}).values():
            if matrix.is_cuda:  # steps that are still running may read it
                matrix.record_stream(torch.cuda.current_stream(matrix.device))
        if self._copies is not None:
            self.tables.ranks_SLP[slot].zero_()
            self.tables.replaced_offsets_S2[slot].zero_()
        if self._memory is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, slot * self._bytes_per_slot, self._bytes_per_slot)

    def a(self, slot: int, layer: int, projections: slice) -> torch.Tensor:
        """[Σ r, in]: the stacked A's of projections that share an input."""
        start = int(self.a_offsets_SLP[slot, layer, projections.start])
        rank = int(self.ranks_SLP[slot, layer, projections].sum())
        return matrix_at(self.numbers_SF[slot], start, rank, self.projections.input_width(layer, projections))

    def b(self, slot: int, layer: int, projection: int) -> torch.Tensor:
        """[r, out]: alpha / r · Bᵀ of one projection."""
        rank = int(self.ranks_SLP[slot, layer, projection])
        start = int(self.b_offsets_SLP[slot, layer, projection])
        return matrix_at(self.numbers_SF[slot], start, rank, self.projections.shapes[layer][projection][0])

    def d(self, slot: int, layer: int, projection: int) -> torch.Tensor | None:
        """[out]: DoRA's f - 1 of one projection; None: it has none."""
        start = int(self.d_offsets_SLP[slot, layer, projection])
        out, _ = self.projections.shapes[layer][projection]
        return None if start < 0 else self.numbers_SF[slot, start : start + out]

"""Adapters cut alike: from a packed adapter of the whole model to the one of a rank.

A projection that is cut along its outputs has all of A and the rank's columns of Bᵀ; one that is cut along its inputs
has the rank's columns of A and all of Bᵀ, and its output is a term of the sum over ranks. d of DoRA goes with the
outputs. Heads and embeddings that an adapter replaces are whole on every rank.
"""

from stellarbyte.lora.bank import PackedAdapter, Projections, matrix_at, offsets
from stellarbyte.lora.untouched_memory import large_array
from stellarbyte.model.parts import PARTS, Part
from stellarbyte.parallel.shares import RankShare

_PARTS = {part.name: part for part in PARTS}


def cut_adapter(packed: PackedAdapter, share: RankShare) -> PackedAdapter:
    """The adapter for a bank of `share.own_config`."""
    whole, own = Projections.of(share.config), Projections.of(share.own_config)
    tables = packed.ranks_LP, packed.has_factors_LP
    from_LP, (to_a_LP, to_b_LP, to_d_LP, total) = offsets(*tables, whole), offsets(*tables, own)
    numbers = large_array(total, packed.numbers.dtype)
    for layer, number, _ in whole.modules():
        rank = int(packed.ranks_LP[layer, number])
        if not rank:
            continue
        part = _PARTS[whole.names[number]]
        (out, width), (own_out, own_width) = whole.shapes[layer][number], own.shapes[layer][number]
        outputs, inputs = _cuts(part, share, layer)
        a_start, b_start, d_start = (int(starts[layer, number]) for starts in from_LP[:3])
        a = matrix_at(packed.numbers, a_start, rank, width)[:, inputs]
        matrix_at(numbers, int(to_a_LP[layer, number]), rank, own_width).copy_(a)
        b = matrix_at(packed.numbers, b_start, rank, out)[:, outputs]
        matrix_at(numbers, int(to_b_LP[layer, number]), rank, own_out).copy_(b)
        if packed.has_factors_LP[layer, number]:
            d = packed.numbers[d_start : d_start + out][outputs]
            numbers[int(to_d_LP[layer, number]) :][:own_out].copy_(d)
    return PackedAdapter(
        numbers=numbers, ranks_LP=packed.ranks_LP, has_factors_LP=packed.has_factors_LP, replaced=packed.replaced
    )


def _cuts(part: Part, share: RankShare, layer: int) -> tuple[slice, slice]:
    """The rank's outputs and inputs of a linear."""
    piece, everything = share.piece(part, layer), slice(None)
    return (everything, piece) if part.cut == "in" else (piece, everything)

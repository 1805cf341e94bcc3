"""Shares of ranks: together they are the whole model, and what cannot be divided is refused."""

import math

import pytest
import torch

from stellarbyte.checkpoint.shapes import expected_shapes
from stellarbyte.parallel.shares import RankShare, UndividedError, own_width, possible_ranks, refuse_undivided, span
from tests.support.models.byte_transformer import EXPERT_VARIANTS, EXPERTS, VARIANTS, make_config


@pytest.mark.parametrize(("total", "ranks"), [(7, 5), (9, 2), (3, 2), (97, 4), (7, 7), (8, 3)])
def test_spans_are_neighbours_of_nearly_one_size_and_the_first_is_the_largest(total: int, ranks: int) -> None:
    spans = [span(total, rank, ranks) for rank in range(ranks)]
    assert [number for own in spans for number in own] == list(range(total))
    assert len(spans[0]) == max(map(len, spans)) == math.ceil(total / ranks)
    assert min(map(len, spans)) == total // ranks


@pytest.mark.parametrize(
    ("total", "widths"),
    [
        (11008, [2752] * 4),  # as without groups
        (96, [32, 32, 32]),
        (160, [64, 64, 32]),
        (1376, [480, 448, 448]),
        (64, [22, 21, 21]),  # too few groups
        (100, [34, 33, 33]),  # no groups
    ],
)
def test_inner_channels_are_divided_in_groups_of_32_where_there_are_enough(total: int, widths: list[int]) -> None:
    assert [own_width(total, rank, len(widths)) for rank in range(len(widths))] == widths


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("variant", VARIANTS | EXPERT_VARIANTS)
def test_the_pieces_of_all_ranks_are_every_number_once_or_whole_on_each(variant: str, ranks: int) -> None:
    """A copy of a key-value head counts as one number; biases of sums are on the first rank alone."""
    config = make_config(**(VARIANTS | EXPERT_VARIANTS)[variant])
    shares = [RankShare(config=config, rank=rank, ranks=ranks) for rank in range(ranks)]
    for name, shape in expected_shapes(config).items():
        counts = torch.zeros(shape)
        for share in shares:
            piece = share.pieces()[name]
            counts[piece.index] += 0 if piece.is_zero else 1
        is_of_kv_head = any(part in name for part in ("k_proj", "v_proj", "k_norm")) and name not in _norms_per_head(
            config
        )
        copies = shares[0].kv_copies if is_of_kv_head else 1
        assert counts.unique().tolist() in ([copies], [ranks]), name


def _norms_per_head(config) -> list[str]:
    return [name for name in expected_shapes(config) if name.endswith("k_norm.weight") and config.qk_norm_per_head]


def test_query_heads_are_with_the_key_value_head_that_they_read() -> None:
    config = make_config(num_attention_heads=12, num_key_value_heads=2, head_dim=4, hidden_size=48)
    for ranks in (2, 4, 12):
        for rank in range(ranks):
            pieces = RankShare(config=config, rank=rank, ranks=ranks).pieces()
            queries = pieces["model.layers.0.self_attn.q_proj.weight"].index[0]
            (keys,) = pieces["model.layers.0.self_attn.k_proj.weight"].index
            own_heads = range(queries.start // 4, queries.stop // 4)
            assert {head // 6 for head in own_heads} == set(range(keys.start // 4, keys.stop // 4))


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, 3, "3 ranks cannot divide 4 query heads .* with 2 key-value heads .*; possible are 1, 2, 4"),
        ({}, 8, "8 ranks cannot divide 4 query heads"),
        ({"num_key_value_heads": 4, "intermediate_size": 3}, 4, r"intermediate_size \(3\)"),
        (EXPERTS | {"num_experts": 3}, 4, r"num_experts \(3\)"),
        (EXPERTS | {"shared_expert_intermediate_size": 2}, 4, r"shared_expert_intermediate_size \(2\)"),
    ],
)
def test_what_ranks_cannot_divide_is_refused_by_name(changes, ranks: int, message: str) -> None:
    with pytest.raises(UndividedError, match=message):
        refuse_undivided(make_config(**changes), ranks)


def test_possible_ranks_are_those_that_are_not_refused() -> None:
    for heads, kv_heads in ((4, 2), (9, 3), (32, 8), (12, 4), (8, 8), (6, 1)):
        config = make_config(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=4)
        accepted = []
        for ranks in range(1, 65):
            try:
                refuse_undivided(config, ranks)
                accepted.append(ranks)
            except UndividedError:
                pass
        assert possible_ranks(config, 64) == accepted

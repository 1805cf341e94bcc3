"""Logits of all tokens from the ranks' own; tokens that rank 0 decides."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stellarbyte.parallel.group import SingleRankGroup
from stellarbyte.parallel.shares import RankShare
from stellarbyte.parallel.vocabulary import RankVocabulary
from tests.support.engines.ranks import Meeting, ThreadGroup
from tests.support.models.byte_transformer import make_config


@pytest.mark.parametrize("vocab_size", [96, 97])
def test_logits_are_padded_only_where_a_rank_has_fewer(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    padded: list[int] = []

    def pad(x: torch.Tensor, sizes: tuple[int, int]) -> torch.Tensor:
        padded.append(sizes[1])
        return F.pad(x, sizes)

    monkeypatch.setattr("stellarbyte.parallel.vocabulary.F", SimpleNamespace(pad=pad, embedding=F.embedding))
    config, meeting = make_config(vocab_size=vocab_size), Meeting(2)
    logits_RV = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(0))

    def gather(rank: int) -> torch.Tensor:
        vocabulary = RankVocabulary(RankShare(config=config, rank=rank, ranks=2), ThreadGroup(meeting, rank))
        return vocabulary.gather_logits(logits_RV[:, vocabulary.rows.start : vocabulary.rows.stop])

    with ThreadPoolExecutor(2) as threads:
        for gathered in threads.map(gather, range(2)):
            assert torch.equal(gathered, logits_RV)
    assert padded == ([1] if vocab_size % 2 else [])
    alone = RankVocabulary(RankShare(config=config, rank=0, ranks=2), SingleRankGroup(0, 2))
    assert alone.gather_logits(logits_RV[:, : len(alone.rows)]).shape == logits_RV.shape


def test_tokens_that_ranks_sample_differently_are_those_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch orders some sums on a GPU differently each time."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from stellarbyte.parallel.gpu_ranks import GpuRanks
    from stellarbyte_server.engine.run import slot_step

    monkeypatch.setattr(slot_step, "sample", lambda logits_RV, _rows: logits_RV.argmax(dim=-1))
    config, meeting = make_config(), Meeting(3)
    logits_RV = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))

    def sample(rank: int) -> torch.Tensor:
        ranks = GpuRanks(RankShare(config=config, rank=rank, ranks=3), ThreadGroup(meeting, rank))
        model: Any = SimpleNamespace(ranks=ranks, is_invariant=False)
        return slot_step.sample_rows(model, logits_RV.roll(rank, dims=-1), [])

    with ThreadPoolExecutor(3) as threads:
        for tokens_R in threads.map(sample, range(3)):
            assert torch.equal(tokens_R, logits_RV.argmax(dim=-1))

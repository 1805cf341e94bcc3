"""Outputs computed in the same way by all executors: log-probabilities, pooled hidden states, sampling rows."""

from typing import Literal, Protocol

import torch

from stellarbyte.sampling.logprobs import token_logprobs, token_ranks
from stellarbyte.sampling.sampler import NO_TOKEN, RowSampling
from stellarbyte_server.engine.run.step_plan import StepResult
from stellarbyte_server.protocol.messages import TokenLogprob
from stellarbyte_server.protocol.request import SamplingParams

# T tokens of a chunk, C hidden size, R rows that sample, V vocabulary


class Head(Protocol):
    """The last part of a model."""

    def head(self, hidden_RC: torch.Tensor) -> torch.Tensor:
        """[R, V] logits of the next token."""
        ...


def sampling_row(sampling: SamplingParams, position: int) -> RowSampling:
    """Sampling parameters of the token at `position`."""
    return RowSampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        seed=sampling.seed,
        choice=sampling.choice,
        position=position,
    )


def add_logprobs(
    result: StepResult, rows: list[int], num_top: list[int], logits_RV: torch.Tensor, tokens: list[int]
) -> None:
    """Add the log-probabilities of rows' sampled tokens, with `num_top` alternatives; NO_TOKEN has none.

    The logits are the model's own, before any adjustment.
    """
    found = [i for i, token in enumerate(tokens) if token != NO_TOKEN]
    if not found:
        return
    entries = token_logprobs(logits_RV[found], [tokens[i] for i in found], [num_top[i] for i in found])
    for i, entry in zip(found, entries, strict=True):
        result.logprobs.setdefault(rows[i], []).append(TokenLogprob(tokens[i], *entry))


def prompt_logprobs(
    model: Head, chunk_TC: torch.Tensor, following: list[int], num_top: int, rows_at_once: int | None = None
) -> list[TokenLogprob]:
    """Log-probabilities of the tokens in `following`, each after a chunk's token.

    Args:
        rows_at_once: the most rows of logits in memory; None: all.
    """
    scored: list[TokenLogprob] = []
    size = len(following) if rows_at_once is None else rows_at_once
    for start in range(0, len(following), max(1, size)):
        tokens = following[start : start + size]
        logits_TV = model.head(chunk_TC[start : start + len(tokens)])
        found = token_logprobs(logits_TV, tokens, [num_top] * len(tokens))
        ranks = token_ranks(logits_TV, tokens)
        scored += [TokenLogprob(token, *entry, rank) for token, entry, rank in zip(tokens, found, ranks, strict=True)]
    return scored


def pooled_hidden(pooling: Literal["last", "mean"], chunk_TC: torch.Tensor) -> bytes:
    """A chunk's contribution to its prompt's vector, float32 [C]; see `Answer.add_pooled`."""
    pooled_C = chunk_TC[-1] if pooling == "last" else chunk_TC.sum(dim=0)
    return pooled_C.float().numpy(force=True).tobytes()


def last_logits(model: Head, chunk_TC: torch.Tensor) -> bytes:
    """The logits after a chunk's last token, float32 [V]."""
    return model.head(chunk_TC[-1:])[0].float().numpy(force=True).tobytes()

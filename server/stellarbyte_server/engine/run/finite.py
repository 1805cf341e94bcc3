"""Whose numbers a step computed are not finite. Plain Python over its results; decides nothing."""

from math import isnan

import numpy as np

from stellarbyte.sampling.sampler import NO_TOKEN
from stellarbyte_server.engine.state.sequence import Chunk, Sequence, StepResult


def not_finite(chunks: list[Chunk], result: StepResult) -> list[Sequence]:
    """The sequences, not over yet, that got no token, no log-probability or no vector that means anything.

    A step that asks for tokens only pays for one look at their list.
    """
    if NO_TOKEN not in result.tokens and not (result.logprobs or result.prompt_logprobs or result.pooled):
        return []
    broken: list[Sequence] = []
    if NO_TOKEN in result.tokens:
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        broken += [s for s, token in zip(sampling, result.tokens, strict=True) if token == NO_TOKEN]
    broken += [s for s, entry in result.logprobs.items() if isnan(entry.logprob)]
    broken += [s for s, entries in result.prompt_logprobs.items() if any([isnan(e.logprob) for e in entries])]
    broken += [s for s, hidden_C in result.pooled.items() if not np.isfinite(hidden_C).all()]
    return [sequence for sequence in dict.fromkeys(broken) if not sequence.is_over]

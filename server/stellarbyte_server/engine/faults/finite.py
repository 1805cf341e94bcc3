"""The sequences for which a step computed numbers that are not finite."""

from math import isnan

import numpy as np

from stellarbyte_server.engine.run.step_plan import StepResult
from stellarbyte_server.engine.state.sequence import Chunk, Sequence


def not_finite(chunks: list[Chunk], result: StepResult) -> list[Sequence]:
    """The sequences, not over yet, that got no token, no log-probability or no vector that means anything.

    A step that asks for tokens only pays nothing for it.
    """
    if not (result.not_sampled or result.logprobs or result.prompt_logprobs or result.pooled):
        return []
    broken = list(result.not_sampled)
    for of_rows in (result.logprobs, result.prompt_logprobs):
        broken += [row for row, entries in of_rows.items() if any([isnan(entry.logprob) for entry in entries])]
    broken += [row for row, pooled in result.pooled.items() if not np.isfinite(np.frombuffer(pooled, np.float32)).all()]
    sequences = [chunks[row].sequence for row in broken]
    return [sequence for sequence in dict.fromkeys(sequences) if not sequence.is_over]

"""Detection of sequences with NaN or infinity."""

from math import isnan

import numpy as np

from stellarbyte_server.engine.run.step_plan import StepResult
from stellarbyte_server.engine.state.sequence import Chunk, Sequence


def not_finite(chunks: list[Chunk], result: StepResult) -> list[Sequence]:
    """The running sequences without a valid token, or with NaN or infinity in log-probabilities or vectors.

    Costs nothing in steps that only sample.
    """
    if not (result.not_sampled or result.logprobs or result.prompt_logprobs or result.pooled):
        return []
    broken = list(result.not_sampled)
    for of_rows in (result.logprobs, result.prompt_logprobs):
        broken += [row for row, entries in of_rows.items() if any([isnan(entry.logprob) for entry in entries])]
    broken += [row for row, pooled in result.pooled.items() if not np.isfinite(np.frombuffer(pooled, np.float32)).all()]
    sequences = [chunks[row].sequence for row in broken]
    return [sequence for sequence in dict.fromkeys(sequences) if not sequence.is_over]

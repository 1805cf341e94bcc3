"""Comparison of answers that were computed in different ways."""

import numpy as np
import pytest

from stellarbyte_server.protocol.messages import Delta


def assert_same(found: Delta, expected: Delta) -> None:
    """Equal text and tokens; numbers within rounding."""
    for name in ("text", "token_ids", "finish_reason", "num_tokens"):
        assert getattr(found, name) == getattr(expected, name)
    for name in ("logprobs", "prompt_logprobs"):
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert [entry.token_id for entry in ours] == [entry.token_id for entry in theirs]
        assert [[i for i, _ in entry.top] for entry in ours] == [[i for i, _ in entry.top] for entry in theirs]
        assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in theirs], abs=1e-4)
    our_vector, their_vector = (np.frombuffer(delta.embedding or b"", np.float32) for delta in (found, expected))
    np.testing.assert_allclose(our_vector, their_vector, atol=1e-4)

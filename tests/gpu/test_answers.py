"""What requests ask of their answers, on the card, against the same on the CPU."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from server.api.structured import json_grammar
from server.engine.messages import Delta, merged
from stellarbyte.kernels.served_model import TorchModel
from tests.engine import make_request
from tests.models import make_model, random_tokens
from tests.unit.engine.test_answers import model_core
from tests.unit.engine.test_grammar_requests import SCHEMAS, VOCABULARY, drain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]

REQUESTS: list[dict[str, Any]] = [
    {"logprobs": 3, "prompt_logprobs": 2},
    {"logprobs": 0, "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"logit_bias": ((5, 3.0), (6, -100.0)), "min_tokens": 4, "stop_token_ids": (7,)},
    {"grammar": json_grammar(SCHEMAS[0])},
    {"grammar": json_grammar(SCHEMAS[2]), "repetition_penalty": 1.2, "logprobs": 1},
    {"max_tokens": 0, "pooling": "mean"},
    {"max_tokens": 0, "pooling": "last"},
    {"max_tokens": 0, "prompt_logprobs": 0},
]


def test_a_batch_of_all_kinds_of_requests_gets_what_it_gets_on_the_cpu() -> None:
    model = make_model(vocab_size=VOCABULARY)
    requests = [
        make_request(random_tokens(9 + i, seed=i), request_id=str(i), return_token_ids=True, **fields)
        for i, fields in enumerate(REQUESTS)
    ]

    def answers(device: str) -> list[Delta]:
        core = model_core(
            copy.deepcopy(model).to(device), TorchModel, device, num_blocks=200, max_num_batched_tokens=16
        )
        said = drain(core, *requests)
        return [merged([item for item in items if isinstance(item, Delta)]) for items in said.values()]

    for expected, found in zip(answers("cpu"), answers("cuda"), strict=True):
        assert (found.text, found.token_ids, found.finish_reason) == (
            expected.text,
            expected.token_ids,
            expected.finish_reason,
        )
        for name in ("logprobs", "prompt_logprobs"):
            ours, theirs = getattr(found, name), getattr(expected, name)
            assert [entry.token_id for entry in ours] == [entry.token_id for entry in theirs]
            assert [entry.logprob for entry in ours] == pytest.approx([entry.logprob for entry in theirs], abs=1e-4)
        if expected.embedding is not None:
            vectors = [np.frombuffer(answer.embedding or b"", np.float32) for answer in (found, expected)]
            np.testing.assert_allclose(*vectors, atol=1e-4)

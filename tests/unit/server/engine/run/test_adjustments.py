"""What a runner keeps of the adjustments of its sequences: made once each, right after preemptions, gone with them."""

from typing import Any

import pytest

from stellarbyte.sampling.adjustment import LogitAdjustment
from stellarbyte_server.engine.run import adjustments
from tests.support.engines.engine import BACKENDS, Backend, ModelEngine, make_request
from tests.support.models.byte_transformer import make_model, random_tokens

KINDS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"frequency_penalty": -1.5},
    {"logit_bias": ((5, 3.0), (6, -100.0))},
    {},
]


def requests(max_tokens: int = 12) -> list[Any]:
    return [
        make_request(random_tokens(6 + i, seed=i), max_tokens, str(i), seed=i, temperature=1.0, **KINDS[i % 4])
        for i in range(8)
    ]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[LogitAdjustment]:
    made: list[LogitAdjustment] = []

    def noted(*arguments: Any, **fields: Any) -> LogitAdjustment:
        made.append(LogitAdjustment(*arguments, **fields))
        return made[-1]

    monkeypatch.setattr(adjustments, "LogitAdjustment", noted)
    return made


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_sequence_has_its_tensors_made_once(backend: Backend, made: list[LogitAdjustment]) -> None:
    ModelEngine(make_model(), backend=backend, num_blocks=200).generate(requests(30))
    assert len(made) == 6  # two ask for nothing


@pytest.mark.parametrize("backend", BACKENDS)
def test_penalties_follow_the_tokens_of_sequences_that_are_preempted(backend: Backend) -> None:
    model = make_model()
    engine = ModelEngine(model, backend=backend, num_blocks=14)
    assert engine.generate(requests()) == ModelEngine(model, backend=backend, num_blocks=200).generate(requests())
    assert engine.scheduler.totals.num_preemptions > 0


def test_sequences_that_ended_leave_nothing_behind() -> None:
    engine = ModelEngine(make_model(), max_num_seqs=2)
    for _ in range(5):
        engine.generate(requests(2))
    assert len(engine.executor._slots) <= 2

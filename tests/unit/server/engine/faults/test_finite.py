"""A request whose numbers are not finite fails with one error, and no other notices: on every backend."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stellarbyte import ByteTransformer
from stellarbyte.backends.torch_model import TorchModel
from stellarbyte_server.engine.core import EngineCore
from stellarbyte_server.engine.live_answers import NOT_FINITE
from stellarbyte_server.protocol.messages import Delta, merged
from tests.support.engines.engine import BACKENDS, Ahead, make_request
from tests.support.engines.engine_core import drain, model_core
from tests.support.models.byte_transformer import make_model

BAD = 90  # the token whose embedding is NaN
KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 9, "top_p": 0.9},
    {"logprobs": 2},
    {"prompt_logprobs": 1},
    {"frequency_penalty": 0.5, "logit_bias": ((3, 2.0),)},
    {"max_tokens": 0, "prompt_logprobs": 0},
    {"max_tokens": 0, "pooling": "mean"},
    {"max_tokens": 0, "pooling": "last"},
]


def broken_model() -> ByteTransformer:
    model = make_model(tie_word_embeddings=False, num_hidden_layers=2)
    with torch.no_grad():
        model.model.embed_tokens.weight[BAD] = float("nan")
    return model


@pytest.fixture(params=[*BACKENDS, pytest.param(None, id="gpu")])
def cores(request: pytest.FixtureRequest, device: torch.device) -> Iterator[list[EngineCore]]:
    """Engines that must say the same: without and with a step in flight; of the GPU's there is only the latter."""
    model = broken_model()
    options: dict[str, Any] = {"max_num_batched_tokens": 40, "num_blocks": 60}
    if request.param is not None:
        ahead = model_core(model, request.param, num_steps_ahead=1, **options)
        ahead.runner = Ahead(ahead.runner)
        yield [model_core(model, request.param, **options), ahead]
        return
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from tests.support.gpu.gpu_engine import GpuEngine, own_stream

    with own_stream(device):
        yield [GpuEngine(model, device, max_num_seqs=8, max_model_len=40, **options).core()]


def prompt(i: int) -> list[int]:
    return [5 + i, 6, 7, 8, 9]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in Triton's interpreter
def test_it_ends_alone_with_one_clear_error(cores: list[EngineCore]) -> None:
    """Broken requests of every kind run beside sound ones, whose answers are those they have alone."""
    kinds = KINDS if len(cores) > 1 else KINDS[2::3]  # the interpreter takes a second for a token of some of them
    sound = [make_request(prompt(i), **{"max_tokens": 3, "request_id": str(i)} | kind) for i, kind in enumerate(kinds)]
    broken = [
        make_request([*prompt(i), BAD, 3], **{"max_tokens": 3, "request_id": f"bad {i}"} | kind)
        for i, kind in enumerate(kinds)
    ]
    reference = model_core(broken_model(), TorchModel)
    alone = {request.request_id: answer(drain(reference, request)[request.request_id]) for request in sound}
    for core in cores:
        mixed = [request for pair in zip(broken, sound, strict=True) for request in pair]
        said = drain(core, *mixed)
        for request in broken:
            deltas = [item for item in said[request.request_id] if isinstance(item, Delta)]
            assert [(d.finish_reason, d.error, d.text) for d in deltas] == [("error", NOT_FINITE, "")]
        assert {request.request_id: answer(said[request.request_id]) for request in sound} == alone
        assert core.scheduler.pool.num_used == 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_nothing_of_it_is_found_in_the_cache(cores: list[EngineCore]) -> None:
    """Numbers that broke once, as by a fault of the memory, must not break every later request with that prompt."""
    for core in cores:
        request = make_request([*[BAD] * 12, 1], 1, "bad")
        drain(core, request)
        keys = core.scheduler.pool._block_of
        assert not keys
        drain(core, make_request([4] * 13, 1, "sound"))
        assert len(keys) == 3


def answer(items: list[Any]) -> tuple[Any, ...]:
    found = merged([item for item in items if isinstance(item, Delta)])
    logprobs = tuple(round(entry.logprob, 3) for entry in (*found.logprobs, *found.prompt_logprobs))
    return found.finish_reason, found.error, found.text, found.num_tokens, logprobs

"""What is prepared beside the engine is what its steps need, and touches nothing of theirs."""

import logging
import sys
import threading

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte.backends.gpu.preparation import Preparation
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.engines.engine import generated, make_request
from tests.support.gpu.gpu_engine import GpuEngine, own_stream
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import make_model


@pytest.fixture(autouse=True)
def stream(device: torch.device):
    with own_stream(device):
        yield


def make_engine(device: torch.device) -> GpuEngine:
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = make_model(vocab_size=50, intermediate_size=32, **shape)
    adapters = {"a": random_adapter(model.config, seed=1)}
    return GpuEngine(model, device, adapters=adapters, max_num_seqs=1, max_num_batched_tokens=16, max_model_len=64)


def requests() -> list[GenerationRequest]:
    return [
        make_request([5, 6, 7, 8, 9], 4, "plain"),
        make_request(list(range(9)), 3, "adapted", adapter="a"),
        make_request([1, 2, 3], 3, "random", temperature=0.8, top_k=7, seed=5),
    ]


def test_programs_run_and_captured_between_steps_change_no_token(device: torch.device) -> None:
    expected = make_engine(device).generate(requests())
    engine = make_engine(device)
    preparation = Preparation(engine.steps, engine.rehearsal())
    sequences = [engine.add(request) for request in requests()]
    engine.step()
    engine.step()  # one decodes, two wait
    preparation.run_all()
    while preparation.capture_next():
        pass
    engine.drain()
    assert [generated(sequence) for sequence in sequences] == expected
    assert engine.generate(requests()) == expected
    engine.check_nothing_is_left()


@pytest.mark.parametrize("fails", [False, True])
def test_it_says_once_that_all_is_ready_unless_something_is_missing(
    fails: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(device)
    preparation = Preparation(engine.steps, engine.rehearsal())

    def run_all() -> None:
        if fails:
            raise RuntimeError("planted")

    monkeypatch.setattr(preparation, "run_all", run_all)
    monkeypatch.setattr(sys, "setswitchinterval", lambda _: None)  # of this whole process
    with caplog.at_level(logging.INFO, "stellarbyte"):
        preparation.start()
        while preparation.capture_next():
            threading.Event().wait(0.001)
        preparation.stop()
    told = [message for message in caplog.messages if "kernels" in message]
    assert len(told) == 1
    assert told[0].startswith("not all kernels could be prepared" if fails else "kernels are ready")

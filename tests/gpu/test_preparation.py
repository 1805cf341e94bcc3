"""What is prepared beside the engine leaves nothing to compile while requests run."""

import random
import threading

import pytest
import torch

if not torch.cuda.is_available():  # before Triton is imported: the unit tests want its interpreter then
    pytest.skip("torch finds no CUDA device here", allow_module_level=True)
triton = pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte.backends.gpu.preparation import Preparation
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.engines.engine import make_request
from tests.support.gpu.gpu_engine import GpuEngine, own_stream
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import make_model

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
VOCABULARY = 700


def make_engine() -> GpuEngine:
    """Of a shape that no other test has, so that its kernels are new to the process."""
    model = make_model(
        vocab_size=VOCABULARY, hidden_size=144, head_dim=48, num_attention_heads=3, num_key_value_heads=1,
        intermediate_size=208, num_hidden_layers=2,
    )  # fmt: skip
    adapters = {f"a{i}": random_adapter(model.config, seed=i) for i in range(3)}
    return GpuEngine(
        model, DEVICE, dtype=torch.bfloat16, adapters=adapters, num_blocks=700, block_size=16, max_num_seqs=24,
        max_num_batched_tokens=2100, max_model_len=2500,
    )  # fmt: skip


def requests(seed: int) -> list[GenerationRequest]:
    chosen = random.Random(seed)
    kinds = [{}, {"temperature": 0.7}, {"temperature": 1.0, "top_p": 0.8}, {"adapter": "a0"}, {"adapter": "a1"}]
    return [
        make_request(
            chosen.choices(range(VOCABULARY), k=chosen.choice([3, 17, 100, 700])), chosen.randint(2, 20), f"{seed}-{i}",
            seed=i, **chosen.choice(kinds),
        )
        for i in range(30)
    ]  # fmt: skip


def test_requests_compile_nothing_once_all_is_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **what: compiled.append(what["repr"]), raising=False
    )
    with own_stream(DEVICE):
        engine = make_engine()
        Preparation(engine.steps, engine.rehearsal()).run_all()
        assert compiled
        compiled.clear()
        engine.generate([*requests(1), make_request([5] * 2075, 2, "long")])
        assert compiled == []


def test_preparing_on_a_thread_while_requests_run_changes_no_token() -> None:
    with own_stream(DEVICE):
        expected = make_engine().generate(requests(2))
        engine = make_engine()
        preparation = Preparation(engine.steps, engine.rehearsal())
        preparation.start()
        assert engine.generate(requests(2)) == expected
        while preparation.capture_next():
            threading.Event().wait(0.01)
        assert engine.generate(requests(2)) == expected
        engine.check_nothing_is_left()

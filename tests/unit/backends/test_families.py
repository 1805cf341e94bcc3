"""Converted families compute what transformers' own classes compute: in the library, and from every backend's cache."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from stellarbyte import ByteModelConfig, ByteTransformer
from stellarbyte.backends.cpu_model import CpuModel, fits
from stellarbyte.backends.torch_model import TorchModel
from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.native import load_model
from tests.support.engines.engine import ModelEngine
from tests.support.models.families import FAMILIES, LENGTH, ORIGINAL_LENGTH, YARN, tiny_family

NUM_TOKENS = 3  # of an answer
BACKENDS = {"torch": 30, "cpu": 30, "triton": LENGTH - 1}  # tokens of the prompt: the interpreter is slow
ON_TORCH = ("gpt_oss",)  # families that the CPU kernels leave to the torch backend
INTERPRETED = ("gemma2", "phi3 longrope", "gpt_oss")  # also without a GPU: most options of the kernels
ON_A_GPU = [
    name if name in INTERPRETED else pytest.param(name, marks=pytest.mark.slow_without_gpu) for name in FAMILIES
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """A model of transformers and what was converted from it."""

    name: str
    theirs: PreTrainedModel
    ours: ByteTransformer


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """A family's pair, made once."""
    return functools.cache(lambda name: make_pair(name, tmp_path_factory.mktemp("family")))


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, pair_of: Callable[[str], Pair]) -> Pair:
    return pair_of(request.param)


def make_pair(name: str, folder: Path) -> Pair:
    source = tiny_family(folder / "source", name)
    # eager: the other implementations of some releases leave Gemma 2's soft cap out.
    theirs = AutoModelForCausalLM.from_pretrained(source, local_files_only=True, attn_implementation="eager").eval()
    for module in theirs.modules():
        if hasattr(module, "limit"):  # experts of gpt-oss, which follow their config from transformers 5.24 on
            module.limit = theirs.config.swiglu_limit
    return Pair(name=name, theirs=theirs, ours=load_model(convert(source, folder / "target")))


def tokens_of(length: int) -> list[int]:
    return torch.randint(0, 290, (length,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.no_grad()
def their_logits(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """[T, V] float64, of one pass without a cache."""
    return model(torch.tensor([tokens])).logits[0].double()


def their_answer(model: PreTrainedModel, prompt: list[int], num_tokens: int = NUM_TOKENS) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(their_logits(model, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def make_engine(backend: str, model: ByteTransformer, config: ByteModelConfig, device: torch.device):
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        from tests.support.gpu.gpu_engine import GpuEngine

        return GpuEngine(model, device, config, block_size=8, max_num_seqs=2)
    if backend == "cpu":
        assert fits(config), "the engine would take the torch backend instead"
        made = partial(CpuModel, quantization="none", num_threads=2)
    else:
        made = TorchModel
    return ModelEngine(model, config, made, block_size=8, max_num_batched_tokens=20)


@pytest.fixture
def own_stream(device: torch.device) -> Iterator[None]:
    pytest.importorskip("triton", reason="Triton is not installed")
    from tests.support.gpu.gpu_engine import own_stream

    with own_stream(device):
        yield


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_library_agrees_with_transformers(pair: Pair, implementation: str) -> None:
    pair.ours.config._attn_implementation = implementation
    for length in (ORIGINAL_LENGTH, LENGTH):  # longrope has other factors for each
        tokens = tokens_of(length)
        expected = their_logits(pair.theirs, tokens)
        assert expected.std() > 0.5  # a model that says something
        with torch.no_grad():
            found = pair.ours(torch.tensor([tokens])).logits[0].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_the_library_generates_what_transformers_does(pair: Pair) -> None:
    """Across longrope's original length, where the keys in the cache get other rotations."""
    prompt = tokens_of(ORIGINAL_LENGTH - 2)
    found = pair.ours.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert found[0, len(prompt) :].tolist() == their_answer(pair.theirs, prompt, 6)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_served_families_agree_with_transformers(pair: Pair, backend: str, device: torch.device) -> None:
    if backend == "cpu" and pair.name in ON_TORCH:
        assert not fits(pair.ours.config)
        return
    check_served(pair, backend, device)


@pytest.mark.usefixtures("own_stream")
@pytest.mark.parametrize("name", ON_A_GPU)
def test_gpu_kernels_of_families_agree_with_transformers(name: str, device: torch.device, tmp_path: Path) -> None:
    check_served(make_pair(name, tmp_path), "triton", device)


def check_served(pair: Pair, backend: str, device: torch.device) -> None:
    prompt = tokens_of(LENGTH - NUM_TOKENS)
    tokens = prompt + their_answer(pair.theirs, prompt)
    expected = their_logits(pair.theirs, tokens).log_softmax(dim=-1)[BACKENDS[backend] - 1 :]
    engine = make_engine(backend, pair.ours, pair.ours.config, device)
    found = engine.teacher_forced(tokens, BACKENDS[backend]).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    num_answered = min(NUM_TOKENS, LENGTH - BACKENDS[backend])
    assert found.argmax(dim=-1)[-num_answered - 1 : -1].tolist() == tokens[-num_answered:]


@pytest.mark.usefixtures("own_stream")
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_served_context_chooses_the_factors_of_longrope(backend: str, device: torch.device, tmp_path: Path) -> None:
    """Short ones where no sequence can be longer than the original length."""
    pair = make_pair("phi3 longrope", tmp_path)
    tokens = tokens_of(ORIGINAL_LENGTH)
    expected = their_logits(pair.theirs, tokens).log_softmax(dim=-1)[-2:]
    short = ByteModelConfig.from_dict(pair.ours.config.to_dict() | {"full_attention_window": ORIGINAL_LENGTH})
    engine = make_engine(backend, pair.ours, short, device)
    torch.testing.assert_close(engine.teacher_forced(tokens, ORIGINAL_LENGTH - 1).double(), expected, rtol=0, atol=1e-4)


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("smollm3", {"layer_rotations": None}),
    ("granite", {"embedding_multiplier": 1.0}),
    ("granite", {"attention_multiplier": None}),
    ("granite", {"residual_multiplier": 1.0}),
    ("granite", {"logits_multiplier": 1.0}),
    ("phi3", {"sliding_window": None, "layer_types": None}),
    ("phi3 longrope", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("olmo3", {"layer_rotations": None, "local_rope_parameters": None}),
    ("gemma2", {"zero_centered_norms": False}),
    ("gemma2", {"attention_softcap": None}),
    ("gemma2", {"logits_softcap": None}),
    ("gemma3", {"layer_rotations": None, "local_rope_parameters": None}),
    ("ministral", {"layer_types": None}),
    ("gpt_oss", {"layer_types": None}),
    ("gpt_oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
    ("gpt_oss", {"rope_parameters": YARN}),
    ("gpt_oss", {"swiglu_limit": 1e9}),
    ("gpt_oss", {"swiglu_alpha": 1.0}),
    ("gpt_oss", {"softmax_sink": False}),
    ("gpt_oss", {"expert_bias": False}),
    ("gpt_oss", {"router_bias": False}),
]


@pytest.mark.parametrize(("name", "changes"), OPTIONS, ids=str)
def test_each_option_matters_to_the_models_compared(
    name: str, changes: dict[str, Any], pair_of: Callable[[str], Pair]
) -> None:
    """Else a backend that ignored it would pass."""
    pair = pair_of(name)
    other = ByteTransformer(ByteModelConfig.from_dict(pair.ours.config.to_dict() | changes)).eval()
    other.load_state_dict(pair.ours.state_dict(), strict=False)  # without the parameters of an option switched off
    tokens = tokens_of(LENGTH)
    with torch.no_grad():
        found = other(torch.tensor([tokens])).logits[0, -NUM_TOKENS:].double()
    assert (found - their_logits(pair.theirs, tokens)[-NUM_TOKENS:]).abs().amax(dim=-1).min() > 1e-2

"""Mixtures of experts served over the paged cache, and by the server, against transformers' own classes on the same
weights."""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from stellarbyte import ByteTransformer
from stellarbyte.backends.cpu_model import fits
from stellarbyte.backends.torch_model import TorchModel
from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.native import load_model
from stellarbyte.user_cache import cache_folder
from tests.support.cases import some
from tests.support.engines.engine import BACKENDS, Backend, ModelEngine, make_request
from tests.support.models.families import tiny_family
from tests.support.models.hugging_face import tiny_mixtral, tiny_olmoe, tiny_qwen2_moe, tiny_qwen3_moe
from tests.support.servers.server_process import REAL, ServerProcess, running

NEAR_TIE = 1e-3
QUICK, WHOLE = (6, 24), (20, 64)  # prompts, and new tokens of each
FAMILIES: dict[str, Callable[..., Path]] = {
    "mixtral": tiny_mixtral,
    "mixtral with a window": partial(tiny_mixtral, sliding_window=8),
    "qwen2-moe": tiny_qwen2_moe,
    "qwen3-moe": tiny_qwen3_moe,
    "olmoe": tiny_olmoe,
    "gpt-oss": partial(tiny_family, name="gpt_oss"),
}
HIDDEN = 64  # heads of 16 channels, which the CPU kernels take


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """transformers' model and ours."""
    folder = tmp_path_factory.mktemp("families")
    source = FAMILIES[request.param](folder / "source", hidden_size=HIDDEN)
    theirs = AutoModelForCausalLM.from_pretrained(source, local_files_only=True).eval()
    return theirs, load_model(convert(source, folder / "target"))


def engine_of(model: ByteTransformer, **options: object) -> ModelEngine:
    windows = {} if all(model.config.windows) else {"num_blocks": 600}
    return ModelEngine(model, max_num_batched_tokens=13, **(windows | options))


def check_that_it_is_served_so(model: ByteTransformer, backend: Backend) -> None:
    is_left_to_torch = model.config.swiglu_limit is not None
    assert fits(model.config) != is_left_to_torch
    if is_left_to_torch and backend is not TorchModel:
        pytest.skip("the CPU kernels leave clamped SwiGLU to torch")


def random_prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, 290, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_logprobs_over_the_paged_cache_are_those_of_transformers(
    both: tuple[PreTrainedModel, ByteTransformer], backend: Backend
) -> None:
    """A prompt in chunks, then token by token, past several windows of 8: both are as near to float64."""
    theirs, ours = both
    tokens = random_prompt(60, seed=1)
    exact = copy.deepcopy(ours).double()(torch.tensor([tokens])).logits[0].log_softmax(-1)
    assert (theirs(torch.tensor([tokens])).logits[0].double().log_softmax(-1) - exact).abs().max() <= 1e-4
    check_that_it_is_served_so(ours, backend)
    found = engine_of(ours, backend=backend).teacher_forced(tokens, 25)
    assert (found.double() - exact[24:]).abs().max() <= 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("num_prompts", "num_new"), some([QUICK, WHOLE], 0))
def test_greedy_tokens_are_those_of_transformers(
    both: tuple[PreTrainedModel, ByteTransformer], backend: Backend, num_prompts: int, num_new: int
) -> None:
    """In one batch of all prompts. They may differ from the first place on where transformers' two best are a tie."""
    theirs, ours = both
    check_that_it_is_served_so(ours, backend)
    prompts = [random_prompt(3 + seed, seed) for seed in range(num_prompts)]
    requests = [make_request(prompt, num_new, str(i)) for i, prompt in enumerate(prompts)]
    near_ties = 0
    for prompt, found in zip(prompts, engine_of(ours, backend=backend).generate(requests), strict=True):
        out = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False,
            eos_token_id=None, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        expected = out.sequences[0, len(prompt) :].tolist()
        if found != expected:
            agreed = next(n for n, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
            best = out.logits[agreed][0].topk(2).values
            assert float(best[0] - best[1]) < NEAR_TIE, f"differs at token {agreed}"
            near_ties += 1
    assert near_ties <= 1


def test_bfloat16_is_near_float32(both: tuple[PreTrainedModel, ByteTransformer]) -> None:
    """As near as transformers' own bfloat16, in the library and over the paged cache."""
    theirs, ours = both
    tokens = random_prompt(40, seed=2)
    batch = torch.tensor([tokens])
    half = copy.deepcopy(ours).bfloat16()
    with torch.no_grad():
        exact = theirs(batch).logits[0].log_softmax(-1)
        rounded = copy.deepcopy(theirs).bfloat16()(batch).logits[0].float().log_softmax(-1)
        found = half(batch).logits[0].float().log_softmax(-1)
    served = engine_of(half).teacher_forced(tokens, 1).float()
    error = (rounded - exact).abs().mean()
    assert (found - exact).abs().mean() <= 2 * error
    assert (served - exact).abs().mean() <= 2 * error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mixtral(tmp_path_factory.mktemp("served") / "Tiny-Mixtral")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[ServerProcess]:
    flags = ("--model", str(folder), "--device", "cpu", "--kv-cache-memory", "10000000")
    caches = {"STELLARBYTE_CACHE": str(folder.parent / "cache"), "NUMBA_CACHE_DIR": str(cache_folder() / "compiled")}
    with running(REAL, *flags, environment=caches) as server:
        yield server


def test_the_server_answers_as_transformers(server: ServerProcess, folder: Path) -> None:
    prompt = random_prompt(9, seed=3)
    body = {"model": "Tiny-Mixtral", "prompt": prompt, "temperature": 0, "ignore_eos": True, "max_tokens": 20}
    response = httpx.post(f"{server.url}/v1/completions", json=body | {"return_token_ids": True}, timeout=60)
    theirs = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert response.json()["choices"][0]["token_ids"] == expected[0, 9:].tolist()

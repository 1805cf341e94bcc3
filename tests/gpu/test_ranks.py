"""Ranks on several cards against one card: whole engines of one process and of two, from the same files."""

from pathlib import Path
from typing import Any

import pytest
import torch

if torch.cuda.device_count() < 2:
    pytest.skip(f"needs 2 CUDA devices; torch finds {torch.cuda.device_count()}", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte.checkpoint.convert import convert
from stellarbyte.parallel.peers import why_no_peer_memory
from stellarbyte_server.config.settings import EngineSettings
from stellarbyte_server.protocol.messages import Delta
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.engines.engine import make_request
from tests.support.gpu.engine_process import run_engine
from tests.support.models import oracle
from tests.support.models.adapters import write_adapter
from tests.support.models.byte_transformer import make_model
from tests.support.models.quantized import write_quantized
from tests.support.servers.fake_engine import make_tokenizer

pytestmark = pytest.mark.gpu

SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "head_dim": 32}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"num_key_value_heads": 4},
    "windows, one key-value head": {"num_key_value_heads": 1, "sliding_window": 32, "sink_tokens": 4},
    "norms over all heads": {"branch_norms": "after", "qk_norm": True, "qk_norm_per_head": False},
    "biases": {"use_xpos": False, "attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
}


def engine_answers(folder: Path, ranks: int, *batches: list[GenerationRequest], **flags: Any) -> list[list[Delta]]:
    """Of an engine in a process of its own; several ranks must use symmetric memory where the GPUs can share memory."""
    settings = EngineSettings(
        model=str(folder / "model"), device="cuda", tensor_parallel_size=ranks, max_model_len=1024,
        kv_cache_memory=2**28, max_num_seqs=16, max_num_batched_tokens=2048, **flags,
    )  # fmt: skip
    found = run_engine(folder, settings, *batches)
    if ranks > 1 and not why_no_peer_memory(0, ranks):
        assert not [line for line in found.log if "no symmetric memory" in line]
    return found.batches


def save(folder: Path, **changes: Any) -> Any:
    model = make_model(vocab_size=259, eos_token_id=256, max_position_embeddings=2048, **(SIZES | changes))
    model.save_pretrained(folder / "model")
    make_tokenizer().save(str(folder / "model" / "tokenizer.json"))
    return model


def request(number: int, length: int = 40, **fields: Any) -> GenerationRequest:
    told = {"return_token_ids": True, "ignore_eos": True, "logprobs": 1, "seed": number} | fields
    prompt = [(7 + number) * i % 250 for i in range(length)]
    return make_request(prompt, told.pop("max_tokens", 40), request_id=str(number), **told)


REQUESTS = [request(0), request(1, 700), request(2, temperature=0.8, top_p=0.9), request(3, repetition_penalty=1.2)]


@pytest.mark.parametrize("changes", CASES.values(), ids=list(CASES))
def test_answers_have_the_probabilities_of_the_oracle(changes: dict[str, Any], tmp_path: Path) -> None:
    """In float32: eagerly and within graphs, alone and in a batch, with a prompt whose sums go in two shots; the second
    time from the prefix cache."""
    model = save(tmp_path, **changes)
    batches = [REQUESTS[:1], REQUESTS, REQUESTS]
    found = engine_answers(tmp_path, 2, *batches, dtype="float32")
    for requests, answers in zip(batches, found, strict=True):
        for asked, answer in zip(requests, answers, strict=True):
            tokens = [*asked.prompt_token_ids, *answer.token_ids]
            expected = oracle.logprobs(model.state_dict(), model.config, tokens)
            for place, told in enumerate(answer.logprobs, len(asked.prompt_token_ids) - 1):
                assert abs(told.logprob - expected[place, told.token_id]) <= 2e-3


def test_adapters_are_cut_alike(tmp_path: Path) -> None:
    """Plain ones, one with DoRA, and one with a head, in one batch; tokens are those of one card."""
    model = save(tmp_path)
    write_adapter(tmp_path / "adapters" / "plain", model, seed=1)
    write_adapter(tmp_path / "adapters" / "dora", model, seed=2, use_dora=True)
    write_adapter(tmp_path / "adapters" / "head", model, seed=3, modules_to_save=("lm_head",))
    requests = [request(i, adapter=name) for i, name in enumerate(("plain", "dora", "head", None))]
    told = []
    for ranks in (1, 2):
        flags = {"dtype": "float32", "adapter_dir": str(tmp_path / "adapters"), "max_loras": 4}
        (answers,) = engine_answers(tmp_path, ranks, requests, **flags)
        told.append([list(answer.token_ids) for answer in answers])
    assert told[0] == told[1]


@pytest.mark.parametrize("form", ["none", "int8", "fp8", "int4", "awq", "compressed-tensors W8A8"])
def test_forms_of_weights_are_near_those_of_one_card(form: str, tmp_path: Path) -> None:
    """In bfloat16: the log-probability of the same prompt, token by token."""
    flags = {"quantization": form} if form in ("int8", "fp8", "int4") else {}
    if form == "none" or flags:
        save(tmp_path)
    else:
        convert(write_quantized(tmp_path, form)[0], tmp_path / "model")
    asked = make_request([i * 5 % 90 + 1 for i in range(60)], 1, prompt_logprobs=0, ignore_eos=True)
    told = []
    for ranks in (1, 2):
        ((answer,),) = engine_answers(tmp_path, ranks, [asked], **flags)
        told.append(torch.tensor([each.logprob for each in answer.prompt_logprobs]))
    assert (told[0] - told[1]).abs().mean() <= 0.05

"""The GPU model on several ranks, by Triton's interpreter: the answers of one rank, with the oracle's probabilities."""

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from stellarbyte import ByteTransformer
from stellarbyte.backends.gpu import steps
from stellarbyte.backends.gpu.matrices import as_served
from stellarbyte.backends.gpu.prompts import PromptShape
from stellarbyte.backends.gpu.steps import Decoding, Prefill
from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.native import load_model
from stellarbyte.checkpoint.quantized.matrix import QuantizedMatrix
from stellarbyte.lora.bank import LoraBank
from stellarbyte.model.parts import PARTS, adaptable_modules
from stellarbyte.parallel.group import SingleRankGroup
from stellarbyte.parallel.quantized import cut_matrix
from stellarbyte.parallel.shares import RankShare, UndividedError
from stellarbyte_server.engine.start.gpu_rank import load_gpu_model, whole_weights
from stellarbyte_server.engine.start.model_folder import open_model_folder
from stellarbyte_server.protocol.messages import Delta, merged
from stellarbyte_server.protocol.request import GenerationRequest
from tests.support.cases import some
from tests.support.engines.drafting import Guesses
from tests.support.engines.engine import ModelEngine, make_request
from tests.support.engines.engine_core import drain
from tests.support.gpu.gpu_engine import GpuEngine
from tests.support.gpu.ranks import GpuRanksEngine
from tests.support.models import oracle
from tests.support.models.adapters import merged as merged_model
from tests.support.models.adapters import random_adapter
from tests.support.models.byte_transformer import make_model
from tests.support.models.quantized import write_quantized

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="ranks in threads need Triton's interpreter; on cards: tests/gpu/test_ranks.py"
)

VOCABULARY = 259
OLMO2 = {"branch_norms": "after", "qk_norm": True, "qk_norm_per_head": False}
WINDOW = {"sliding_window": 7, "sink_tokens": 2}
BIASES = {"use_xpos": False, "attention_bias": True, "attention_output_bias": True, "mlp_bias": True}
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "num_key_value_heads": 2}
CASES = {
    "plain": ({}, 2),
    "windows, one key-value head": (WINDOW | {"num_key_value_heads": 1}, 2),
    "biases, heads that 2 does not divide": (BIASES | {"num_attention_heads": 3, "num_key_value_heads": 3}, 2),
    "norms over all heads": (OLMO2 | {"num_key_value_heads": 1}, 2),
    "deepnorm, tied, multipliers": (
        {"deepnorm": True, "tie_word_embeddings": True, "embedding_multiplier": 3.0, "logits_softcap": 5.0}, 2
    ),
    "parallel residual, 4 ranks": ({"parallel_residual": True, "num_attention_heads": 4}, 4),
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of one multiprocessor."""
    monkeypatch.setattr(steps, "num_multiprocessors_of", lambda _: 1)


Start = Callable[..., GpuRanksEngine]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[GpuRanksEngine] = []

    def start_ranks(*told: Any, **options: Any) -> GpuRanksEngine:
        started.append(GpuRanksEngine(*told, **options))
        return started[-1]

    yield start_ranks
    for engine in started:
        engine.close()


def tiny_model(**overrides: Any) -> ByteTransformer:
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape |= {"intermediate_size": 36, "head_dim": 16, "eos_token_id": 256}
    return make_model(vocab_size=VOCABULARY, **(shape | overrides))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def answers(engine: GpuRanksEngine | GpuEngine, requests: list[GenerationRequest]) -> list[Delta]:
    said = drain(engine.core(), *requests, limit_s=600)
    return [merged([item for item in said[request.request_id] if isinstance(item, Delta)]) for request in requests]


def request(number: int, length: int = 9, max_tokens: int = 4, **fields: Any) -> GenerationRequest:
    told = {"return_token_ids": True, "ignore_eos": True, "logprobs": 2, "seed": number} | fields
    return make_request(prompt_of(length, number), max_tokens, request_id=str(number), **told)


def assert_oracle(model: ByteTransformer, asked: GenerationRequest, answer: Delta, limit: float = 1e-4) -> None:
    """The log-probabilities of an answer are those of its tokens by the oracle."""
    tokens = [*asked.prompt_token_ids, *answer.token_ids]
    expected = oracle.logprobs(model.state_dict(), model.config, tokens)
    assert len(answer.logprobs) == len(answer.token_ids)
    for place, told in enumerate(answer.logprobs, len(asked.prompt_token_ids) - 1):
        assert abs(told.logprob - expected[place, told.token_id]) <= limit


@pytest.mark.parametrize(("changes", "ranks"), some(list(CASES.values()), 1, 3), ids=list(CASES))
def test_answers_have_the_probabilities_of_the_oracle(start: Start, changes: dict[str, Any], ranks: int) -> None:
    """Of a greedy and a random request in one batch, and of a prompt; the prompts take more than one step."""
    model = tiny_model(**changes)
    requests = [request(0), request(1, 13, temperature=0.9, top_p=0.8), request(2, 6, prompt_logprobs=1)]
    engine = start(model, ranks, max_num_batched_tokens=8)
    found = answers(engine, requests)
    for asked, answer in zip(requests, found, strict=True):
        assert_oracle(model, asked, answer)
    expected = oracle.logprobs(model.state_dict(), model.config, list(requests[2].prompt_token_ids))
    for place, told in enumerate(found[2].prompt_logprobs):
        assert abs(told.logprob - expected[place, told.token_id]) <= 1e-4


def test_the_tokens_of_a_batch_are_those_of_the_reference(start: Start) -> None:
    """Greedy and random, with penalties, with adapters of ranks of their own and without; the second time from the
    prefix cache."""
    model = tiny_model()
    adapters = {name: random_adapter(model.config, seed) for seed, name in enumerate("ab")}
    requests = [
        request(0, 14),
        request(1, 6, temperature=0.9, adapter="a"),
        request(2, 9, adapter="b", adapter_scale=0.5),
        request(3, 9, repetition_penalty=1.3, temperature=0.7, top_k=20, adapter="a"),
    ]
    reference = ModelEngine(model, adapters=adapters, max_num_batched_tokens=16)
    expected = reference.generate(requests)
    engine = start(model, 2, adapters=adapters, max_num_batched_tokens=16)
    for _ in range(2):
        assert [list(answer.token_ids) for answer in answers(engine, requests)] == expected
    assert engine.scheduler.totals.prefix_hits > 0


def test_adapters_beyond_plain_lora_are_cut_alike(start: Start) -> None:
    """With DoRA in some modules, a head and an embedding; biases stay unscaled."""
    model = tiny_model(**BIASES)
    adapter = random_adapter(model.config, 5, dora=0.5, replaced=("lm_head", "model.embed_tokens"), share=0.8)
    engine = start(model, 2, adapters={"a": adapter}, max_num_batched_tokens=16)
    asked = request(0, adapter="a", adapter_scale=0.5)
    (answer,) = answers(engine, [asked])
    assert_oracle(merged_model(model, adapter, 0.5), asked, answer)


@torch.no_grad()
def rounded(model: ByteTransformer, ranks: int, quantization: str) -> ByteTransformer:
    """A copy with the numbers of the quantized pieces of all ranks; the head in int8."""
    found = copy.deepcopy(model)
    names = {part.name: part for part in PARTS}
    for name, module in found.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            axis = {"out": 0, "in": 1}[names[name.split(".", 3)[3]].cut]
            pieces = module.weight.chunk(ranks, dim=axis)
            module.weight.copy_(torch.cat([as_served(name, piece, quantization) for piece in pieces], dim=axis))
    found.lm_head.weight = torch.nn.Parameter(as_served("lm_head", found.lm_head.weight, "int8"))
    return found


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_weights(start: Start, quantization: str) -> None:
    """fp8 is int8 in all but arithmetic, which the interpreter lacks."""
    model = tiny_model(**SIZES)
    adapters = {"a": random_adapter(model.config, 3)}
    engine = start(model, 2, quantization=quantization, adapters=adapters, max_num_batched_tokens=16)
    requests = [request(0), request(1, 12, temperature=0.8), request(2, adapter="a")]
    expected = rounded(model, 2, quantization)
    for asked, answer in zip(requests, answers(engine, requests), strict=True):
        assert_oracle(merged_model(expected, adapters["a"], 1.0) if asked.adapter else expected, asked, answer)


@pytest.mark.parametrize("form", ["awq", "compressed-tensors W8A8"])
def test_quantized_checkpoints_are_served_as_they_are_stored(start: Start, form: str, tmp_path: Path) -> None:
    """With as many bits and the same numbers as on one GPU."""
    source = write_quantized(tmp_path, form, num_hidden_layers=1)[0]
    folder = open_model_folder(convert(source, tmp_path / "model"), is_dummy=False)
    model = load_model(folder.path)
    engine = start(model, 2, folder=folder, max_num_batched_tokens=16)
    assert [each.quantization for each in engine.models] == ["int4" if form == "awq" else "int8"] * 2
    asked = [make_request([3, 1, 4, 1, 5, 9, 2, 6], 3, logprobs=1, return_token_ids=True, ignore_eos=True)]
    assert_oracle(model, asked[0], answers(engine, asked)[0], 2e-3)


@pytest.mark.parametrize("quantization", ["none", "int8", "int4", "fp8", "awq"])
def test_weights_of_modules_are_those_that_the_ranks_multiply_by(quantization: str, tmp_path: Path) -> None:
    """DoRA takes its norms from them."""
    path = tmp_path / "model"
    if quantization == "awq":
        convert(write_quantized(tmp_path, "awq", num_hidden_layers=1)[0], path)
    else:
        make_model(num_hidden_layers=1, **SIZES).save_pretrained(path)
    folder = open_model_folder(path, is_dummy=False)
    asked_for = "none" if quantization == "awq" else quantization
    models, shares = [], [RankShare(config=folder.config, rank=rank, ranks=2) for rank in range(2)]
    for share in shares:
        bank = LoraBank(share.own_config)
        models.append(load_gpu_model(folder, share, SingleRankGroup(share.rank, 2), bank, asked_for))
    weight = whole_weights(folder, shares[0], models[0], asked_for)
    modules = [*adaptable_modules(folder.config), "lm_head", "model.embed_tokens"]
    for module in modules:
        axis = 1 if module.endswith(("o_proj", "down_proj")) else 0
        parts = [model.weight(module).float() for model in models]
        torch.testing.assert_close(weight(module).float(), torch.cat(parts, dim=axis), rtol=1e-6, atol=1e-7)


def test_pieces_of_groups_are_smaller_groups_or_refused_by_name(tmp_path: Path) -> None:
    matrix = QuantizedMatrix(
        kind="int4",
        codes=torch.randint(256, (4, 192), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        scales=torch.rand(4, 3, generator=torch.Generator().manual_seed(1)).half(),
        zeros=torch.full((4, 3), 7, dtype=torch.uint8),
    )
    piece = cut_matrix("down", matrix, (slice(None), slice(192, 384)), 2)
    assert piece.group_size == 64
    assert torch.equal(piece.dequantized(), matrix.dequantized()[:, 192:])
    with pytest.raises(UndividedError, match=r"8 ranks cannot divide down, .* inputs 48 to 96: groups of 128 in int4"):
        cut_matrix("down", matrix, (slice(None), slice(48, 96)), 8)
    model = tiny_model(hidden_size=64, intermediate_size=96, num_hidden_layers=1, head_dim=16)
    model.save_pretrained(tmp_path)
    folder = open_model_folder(tmp_path, is_dummy=False)
    share = RankShare(config=folder.config, rank=0, ranks=2)
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.o_proj\.weight has 16 inputs; int4 needs a multiple of 32"
    ):
        load_gpu_model(folder, share, SingleRankGroup(0, 2), LoraBank(share.own_config), "int4")


def test_drafts_are_verified_on_all_ranks(start: Start) -> None:
    """Right ones and wrong ones; the tokens are those without drafts."""
    model = tiny_model()
    asked = make_request(prompt_of(6), 10, return_token_ids=True, ignore_eos=True)
    (expected,) = ModelEngine(model).generate([asked])
    engine = start(model, 2, max_drafted=16)
    drafts = Guesses({"r": expected}, random.Random(0), runs_ahead=True)
    answer = merged([item for item in drain(engine.core(drafts), asked, limit_s=600)["r"] if isinstance(item, Delta)])
    assert list(answer.token_ids) == expected
    assert 0 < drafts.totals.num_accepted_tokens < drafts.totals.num_draft_tokens


def test_programs_that_are_run_to_compile_them_need_no_other_rank(start: Start) -> None:
    """Other ranks compile at other times, while steps run."""
    model = tiny_model(**OLMO2)
    adapters = {"a": random_adapter(model.config, 1)}
    engine = start(model, 2, adapters=adapters, max_num_seqs=2, max_num_batched_tokens=16)
    others = engine.executors[0]._steps
    others.model = others.model.alone()
    rehearsal = GpuEngine.rehearsal_of(others)
    for key in (Decoding(2, 2, truncates=False), Prefill(PromptShape(16, 2, 1, 2), truncates=True)):
        rehearsal.run_program(key)

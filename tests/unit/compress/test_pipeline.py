"""Whole models, compressed into folders: what is served, what is reported, what other programs read."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from stellarbyte.backends.cpu_model import CpuModel
from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.errors import CheckpointError
from stellarbyte.checkpoint.native import load_model, load_quantized, open_checkpoint
from stellarbyte.compress import CompressError, Pruning, Quantization, Report, Texts, compress, own_answers, read_texts
from tests.support.engines.engine import ModelEngine
from tests.support.models.hugging_face import tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3, tiny_qwen3_moe

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "initializer_range": 0.1,
    "max_position_embeddings": 64,
}
LENGTH = 48


def random_texts() -> Texts:
    ids = torch.randint(3, 300, (20, LENGTH), generator=torch.Generator().manual_seed(0))
    return Texts(calibration_BT=ids[:15], held_out_BT=ids[15:], num_left_out=0, source="random")


TEXTS = random_texts()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted folder with biases and a tied head."""
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama(folder / "source", **SHAPE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    return convert(folder / "source", folder / "model")


@torch.no_grad()
def logprobs(model: Any, ids: torch.Tensor = TEXTS.held_out_BT) -> torch.Tensor:
    return model(ids).logits.double().log_softmax(dim=-1)


def check_quality(report: Report, before: Any, after: Any) -> None:
    """The report against whole forward passes, in float64."""
    ids = TEXTS.held_out_BT
    log_p, log_q = (logprobs(model)[:, :-1] for model in (before, after))
    for found, log_probs in zip(
        (report.quality.perplexity_before, report.quality.perplexity_after), (log_p, log_q), strict=True
    ):
        nll = -log_probs.gather(-1, ids[:, 1:, None]).mean()
        assert found == pytest.approx(math.exp(nll), rel=1e-4)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean()
    assert report.quality.kl == pytest.approx(float(kl), rel=1e-3, abs=1e-7)
    assert report.quality.tokens == ids[:, 1:].numel()


@pytest.mark.parametrize(
    ("method", "kind"),
    [("round", "int4"), ("gptq", "int4"), ("awq", "int4"), ("smoothquant", "int8"), ("gptq", "fp8"), ("awq", "int8")],
)
def test_what_was_calibrated_is_served(method: Any, kind: Any, llama: Path, tmp_path: Path) -> None:
    """The CPU kernels compute with the weights of the report, without rounding them once more."""
    report = compress(llama, tmp_path / "small", TEXTS, quantization=Quantization(method=method, kind=kind))
    config = open_checkpoint(tmp_path / "small").config
    small = load_model(tmp_path / "small")
    check_quality(report, load_model(llama), small)
    assert json.loads((tmp_path / "small/report.json").read_text())["quality"]["kl"] == report.quality.kl
    assert not config.tie_word_embeddings and report.num_bytes[1] < 0.4 * report.num_bytes[0]
    model, kept = load_quantized(tmp_path / "small", dtype=torch.float32)
    served = CpuModel(model, config, quantization="none", num_threads=2, kept=kept)
    assert served.quantization == kind
    for module in ("model.layers.1.mlp.down_proj", "model.layers.2.self_attn.k_proj", "lm_head"):
        exact = small.get_parameter(f"{module}.weight")
        torch.testing.assert_close(served.weight(module), exact, rtol=3e-7, atol=1e-8)
    row = TEXTS.held_out_BT[0].tolist()
    engine = ModelEngine(
        model, config, partial(CpuModel, quantization="none", num_threads=2, kept=kept), {}, block_size=8,
        max_num_batched_tokens=20,
    )  # fmt: skip
    found = engine.teacher_forced(row, 8).double()
    tolerance = 1e-4 if kind == "fp8" else 5e-4  # integers are multiplied by activations of 16 bits
    torch.testing.assert_close(found, logprobs(small)[0, 7:], rtol=0, atol=tolerance)


def test_gptq_is_better_than_rounding_on_every_layer(llama: Path, tmp_path: Path) -> None:
    """On the layers' products, and on the whole model's divergence. Embedding, norms and biases stay bit for bit."""
    reports = {}
    for method in ("round", "gptq", "awq"):
        reports[method] = compress(llama, tmp_path / method, TEXTS, quantization=Quantization(method=method))
    for name in ("gptq", "awq"):
        assert len(reports[name].matrices) == 3 * 4 + 1
        for matrix in reports[name].matrices:
            assert matrix.method == name and matrix.num_rows == TEXTS.calibration_BT.numel()
            assert matrix.error is not None and matrix.error_of_rounding is not None
            assert 0 < matrix.error < matrix.error_of_rounding
    assert reports["gptq"].quality.kl < 0.6 * reports["round"].quality.kl
    assert reports["awq"].quality.kl < reports["round"].quality.kl
    before, after = load_file(llama / "model.safetensors"), load_file(tmp_path / "gptq/quantized.safetensors")
    plain = before.keys() & after.keys()
    assert "model.embed_tokens.weight" in plain and "model.layers.1.self_attn.q_proj.bias" in plain
    assert all(torch.equal(before[name], after[name]) for name in plain)
    assert (tmp_path / "gptq/tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()


def test_later_layers_are_calibrated_with_earlier_errors(llama: Path, tmp_path: Path) -> None:
    """The Gram matrix behind the last layer's error is that of the inputs in the quantized model."""
    report = compress(llama, tmp_path / "small", TEXTS, quantization=Quantization(method="gptq"))
    inputs: dict[str, torch.Tensor] = {}
    small, before = load_model(tmp_path / "small"), load_model(llama)
    name = "model.layers.2.self_attn.o_proj"
    for key, model in (("small", small), ("before", before)):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, given, key=key: inputs.__setitem__(key, given[0].double()))
        model(TEXTS.calibration_BT)
    original = before.get_submodule(name).weight.double()
    # o_proj of the same layer is rounded before q, k and v of it have changed its inputs
    reported = next(matrix.error for matrix in report.matrices if matrix.name == name)
    gap = original - small.get_submodule(name).weight.double()
    errors = {key: float((x @ gap.T).square().sum() / (x @ original.T).square().sum()) for key, x in inputs.items()}
    assert reported == pytest.approx(errors["small"], rel=0.1)


def test_a_head_may_stay(llama: Path, tmp_path: Path) -> None:
    settings = Quantization(method="gptq", kind="int8", head=False)
    report = compress(llama, tmp_path / "small", TEXTS, quantization=settings)
    checkpoint = open_checkpoint(tmp_path / "small")
    assert checkpoint.config.tie_word_embeddings and report.head == "as stored"
    assert "lm_head.weight" not in checkpoint.quantized
    check_quality(report, load_model(llama), load_model(tmp_path / "small"))


def test_experts_are_calibrated_with_their_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And rounded where too few tokens chose them, which the report says."""
    tiny_qwen3_moe(tmp_path / "source", **SHAPE | {"moe_intermediate_size": 64, "head_dim": 32})
    source = convert(tmp_path / "source", tmp_path / "model")
    for least in (10**9, 1):
        monkeypatch.setattr("stellarbyte.compress.quantization.layers.MIN_EXPERT_ROWS", least)
        report = compress(source, tmp_path / f"small {least}", TEXTS, quantization=Quantization(method="gptq"))
        check_quality(report, load_model(source), load_model(tmp_path / f"small {least}"))
        of_experts = [matrix for matrix in report.matrices if ", expert " in matrix.name]
        assert len(of_experts) == 2 * 8 * 2  # the first layer is dense
        assert {matrix.method for matrix in of_experts} == ({"round"} if least > 1 else {"gptq"})
        assert any("8 of 8 experts are rounded: fewer than 1000000000" in note for note in report.notes) is (least > 1)
        if least == 1:
            first = [matrix.num_rows for matrix in of_experts[:16:2]]
            assert sum(first) == 3 * TEXTS.calibration_BT.numel()  # a token chooses three
            assert all(matrix.error <= matrix.error_of_rounding for matrix in of_experts)
            totals = [sum(getattr(matrix, name) for matrix in of_experts) for name in ("error", "error_of_rounding")]
            assert totals[0] < 0.8 * totals[1]


FAMILIES = {"llama": tiny_llama, "mistral": tiny_mistral, "qwen2": tiny_qwen2, "qwen3": tiny_qwen3}


@pytest.mark.parametrize(("family", "kind"), [(name, "int4") for name in FAMILIES] + [("llama", "int8")])
def test_folders_of_compressed_tensors_have_the_same_numbers(family: str, kind: Any, tmp_path: Path) -> None:
    """Read back by the conversion, whose decoder is tested with what compressed-tensors itself has packed."""
    FAMILIES[family](tmp_path / "source", **SHAPE)
    source = convert(tmp_path / "source", tmp_path / "model")
    settings = Quantization(method="gptq", kind=kind)
    report = compress(source, tmp_path / "small", TEXTS, quantization=settings, form="compressed-tensors")
    again = convert(tmp_path / "small", tmp_path / "again")
    assert {matrix.kind for matrix in open_checkpoint(again).quantized.values()} == {kind}
    assert "lm_head.weight" not in open_checkpoint(again).quantized
    check_quality(report, load_model(source), load_model(again))
    assert open_checkpoint(again).config.to_dict() | {"dtype": None} == open_checkpoint(source).config.to_dict() | {
        "dtype": None
    }


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_transformers_reads_folders_of_compressed_tensors(kind: Any, llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    settings = Quantization(method="gptq", kind=kind)
    report = compress(llama, tmp_path / "small", TEXTS, quantization=settings, form="compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()
    check_quality(report, load_model(llama), theirs)


def test_models_that_transformers_lacks_are_refused_by_name(tmp_path: Path) -> None:
    tiny_qwen3_moe(tmp_path / "source", **SHAPE | {"moe_intermediate_size": 64})
    source = convert(tmp_path / "source", tmp_path / "model")
    with pytest.raises(CompressError, match=r"Llama, Mistral, Qwen2 or Qwen3; this model has num_experts = 8"):
        compress(
            source, tmp_path / "small", TEXTS, quantization=Quantization(method="round"), form="compressed-tensors"
        )  # fmt: skip


def test_kind_and_method_of_compressed_tensors(llama: Path, tmp_path: Path) -> None:
    for settings, told in ((None, "needs a method"), (Quantization(method="round", kind="fp8"), "not for fp8")):
        with pytest.raises(CompressError, match=told):
            compress(
                llama, tmp_path / "small", TEXTS, quantization=settings, pruning=Pruning(weights=0.1),
                form="compressed-tensors",
            )  # fmt: skip
    assert not (tmp_path / "small").exists()


def test_errors_leave_nothing_behind(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(CheckpointError, match="full is not empty"):
        compress(llama, tmp_path / "full", TEXTS, quantization=Quantization(method="round"))
    with pytest.raises(CompressError, match="nothing to do"):
        compress(llama, tmp_path / "small", TEXTS, quantization=None)
    long = Texts(
        calibration_BT=torch.zeros(1, 65, dtype=torch.int64), held_out_BT=TEXTS.held_out_BT, num_left_out=0, source=""
    )
    with pytest.raises(CompressError, match="Contexts of 65 tokens are longer than the model's 64"):
        compress(llama, tmp_path / "small", long, quantization=Quantization(method="round"))
    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors")
    with pytest.raises(CompressError, match="not finite"):
        compress(broken, tmp_path / "small", TEXTS, quantization=Quantization(method="gptq"))
    assert not (tmp_path / "small").exists() and not list(tmp_path.glob(".small*"))


def test_calibration_never_overlaps_held_out_text(llama: Path, tmp_path: Path) -> None:
    """Runs of 64 tokens of the held-out text, wherever they begin, keep a context out."""
    tokenizer = Tokenizer.from_file(str(llama / "tokenizer.json"))
    numbers = torch.randint(0, 10, (40_000,), generator=torch.Generator().manual_seed(0)).tolist()
    text = "".join(map(str, numbers))
    (tmp_path / "held.txt").write_text(text[20_000:])
    (tmp_path / "calibration.txt").write_text(text[:10_000] + text[30_005:31_000] + text[10_000:20_000])
    sizes = {"num_contexts": 12, "num_held_out": 1000, "context": 128}
    found = read_texts(tokenizer, tmp_path / "calibration.txt", tmp_path / "held.txt", **sizes)
    assert 1 <= found.num_left_out <= 10 and found.calibration_BT.shape == (12, 128)
    held_out = tokenizer.decode(found.held_out_BT.flatten().tolist()).replace(" ", "")
    for row in found.calibration_BT:
        words = tokenizer.decode(row.tolist()).replace(" ", "")
        assert words[10:-10] not in held_out
    alone = read_texts(tokenizer, tmp_path / "calibration.txt", None, **sizes)  # the last fifth is held out
    assert alone.held_out_BT.shape[1] == 128 and alone.num_left_out == 0
    with pytest.raises(CompressError, match=r"All contexts of .*held\.txt share text"):
        read_texts(tokenizer, tmp_path / "held.txt", tmp_path / "held.txt", **sizes)
    (tmp_path / "short.txt").write_text("one two")
    with pytest.raises(CompressError, match=r"short\.txt has fewer than 256 tokens"):
        read_texts(tokenizer, tmp_path / "short.txt", None, **sizes)
    with pytest.raises(CompressError, match=r"short\.txt is too short: it has fewer than 128 tokens"):
        read_texts(tokenizer, tmp_path / "calibration.txt", tmp_path / "short.txt", **sizes)
    (tmp_path / "short.txt").write_bytes(b"\xff")
    with pytest.raises(CompressError, match=r"short\.txt is not UTF-8 text: byte 0"):
        read_texts(tokenizer, tmp_path / "short.txt", None, **sizes)


def test_own_answers_are_repeatable_and_full(llama: Path) -> None:
    model = load_model(llama)
    sizes = {"num_contexts": 5, "num_held_out": 3, "context": 20}
    first, again, other = (own_answers(model, **sizes, seed=seed) for seed in (1, 1, 2))
    assert first.calibration_BT.shape == (5, 20) and first.held_out_BT.shape == (3, 20)
    assert torch.equal(first.calibration_BT, again.calibration_BT)
    assert not torch.equal(first.calibration_BT, other.calibration_BT)
    mean = logprobs(model, first.calibration_BT)[:, :-1].gather(-1, first.calibration_BT[:, 1:, None]).mean()
    strange = torch.randint(0, 300, (5, 20))
    assert mean > logprobs(model, strange)[:, :-1].gather(-1, strange[:, 1:, None]).mean() + 0.5
    with pytest.raises(CompressError, match="Contexts of 65 tokens are longer"):
        own_answers(model, num_contexts=1, num_held_out=1, context=65, seed=0)

"""Models quantized by other programs: every layout gives the logits of its dequantized weights, with and without an
adapter, from each backend."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from stellarbyte.backends.cpu_model import CpuModel
from stellarbyte.backends.torch_model import TorchModel
from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.native import load_model, load_quantized, open_checkpoint
from stellarbyte.compress.quantization.grid import Grid
from stellarbyte.model.parts import adaptable_modules
from tests.support.cases import SLOW_WITHOUT_GPU, some
from tests.support.engines.engine import ModelEngine
from tests.support.models.adapters import RandomAdapter
from tests.support.models.quantized import FORMATS, write_quantized

TOLERANCE = 1e-4  # of log-probabilities
INTEGERS = 5e-4  # of those by CPU kernels that round activations to 16 bits, see `ops.cpu.panels.integers`
LENGTH, FIRST = 24, 16
ON_A_GPU = some(list(FORMATS), *map(list(FORMATS).index, ("awq",)), mark=SLOW_WITHOUT_GPU)
ADAPTER = "tuned"


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A converted folder, and what transformers and PEFT compute with its dequantized weights."""

    name: str
    folder: Path
    plain: Path
    expected: torch.Tensor  # log-probabilities after tokens FIRST - 1 …
    adapted: torch.Tensor
    adapter: RandomAdapter


@pytest.fixture(scope="module", params=FORMATS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(request.param, tmp_path_factory.mktemp("format"))


def make_pair(name: str, folder: Path, **options: Any) -> Pair:
    quantized, plain = write_quantized(folder, name, **options)
    theirs = AutoModelForCausalLM.from_pretrained(plain, local_files_only=True).eval()
    expected = their_logprobs(theirs)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(1)
    lora = LoraConfig(
        r=4, lora_alpha=16, target_modules=modules[:4] if "experts" in options else modules, init_lora_weights=False
    )
    tuned = get_peft_model(theirs, lora).eval()
    weights = {
        module.removeprefix("base_model.model."): (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        for module, layer in tuned.named_modules()
        if hasattr(layer, "lora_A")
    }
    adapter = RandomAdapter(
        {module: (a.detach().clone(), b.detach().clone()) for module, (a, b) in weights.items()},
        dict.fromkeys(weights, 16 / 4),
        {},
    )
    adapted = their_logprobs(tuned)
    assert expected.std() > 0.3 and (adapted - expected).abs().max() > 0.1  # both say something
    return Pair(
        name=name, folder=convert(quantized, folder / "target"), plain=plain, expected=expected, adapted=adapted,
        adapter=adapter,
    )  # fmt: skip


TOKENS = torch.randint(0, 290, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()


@torch.no_grad()
def their_logprobs(model: PreTrainedModel) -> torch.Tensor:
    return model(torch.tensor([TOKENS])).logits[0].double().log_softmax(dim=-1)[FIRST - 1 :]


def engine_of(backend: str, pair: Pair, device: torch.device) -> Any:
    model = load_model(pair.folder)
    adapters = {ADAPTER: pair.adapter}
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
        from tests.support.gpu.gpu_engine import GpuEngine

        model, kept = load_quantized(pair.folder, dtype=torch.float32)
        config = open_checkpoint(pair.folder).config
        return GpuEngine(model, device, config, adapters=adapters, kept=kept, block_size=8, max_num_seqs=2)
    made: Any = TorchModel
    if backend == "cpu":
        model, kept = load_quantized(pair.folder, dtype=torch.float32)
        made = partial(CpuModel, quantization="none", num_threads=2, kept=kept)
    config = open_checkpoint(pair.folder).config
    return ModelEngine(model, config, made, adapters, block_size=8, max_num_batched_tokens=20)


def check_served(backend: str, pair: Pair, device: torch.device, first: int = FIRST) -> Any:
    engine = engine_of(backend, pair, device)
    for expected, fields in ((pair.expected, {}), (pair.adapted, {"adapter": ADAPTER})):
        found = engine.teacher_forced(TOKENS, first, **fields).double()
        is_rounded = backend == "cpu" and engine.executor.model.quantization in ("int8", "int4")
        tolerance = INTEGERS if is_rounded else TOLERANCE
        torch.testing.assert_close(found, expected[first - FIRST :], rtol=0, atol=tolerance)
    return engine


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_logits_are_those_of_the_dequantized_weights(pair: Pair, backend: str, device: torch.device) -> None:
    engine = check_served(backend, pair, device)
    if backend == "cpu":
        form = FORMATS[pair.name].form
        is_dequantized = form is None or "groups of 16" in pair.name or pair.name.endswith("FP8 blocks")
        assert engine.executor.model.quantization == ("none" if is_dequantized else form)


def test_numbers_are_kept_exactly(pair: Pair) -> None:
    """In float32: integers with scales of 16 bits have such numbers; others are rounded once."""
    numbers, found = load_file(pair.plain / "model.safetensors"), load_model(pair.folder).state_dict()
    form = FORMATS[pair.name].form
    is_rounded = form == "fp8" or pair.name in ("fp8 blocks, cut off", "nf4", "nf4, double", "LLM.int8")
    for name, tensor in numbers.items():
        torch.testing.assert_close(found[name], tensor, rtol=3e-7 if is_rounded else 0, atol=1e-9 if is_rounded else 0)
    kept = open_checkpoint(pair.folder).quantized
    assert {matrix.kind for matrix in kept.values()} == ({form} - {None})
    assert ("lm_head.weight" in kept) == (FORMATS[pair.name].has_head and form is not None)


@pytest.mark.parametrize(("name", "form"), [("awq", "int4"), ("nf4", "none")])
def test_quantized_experts_are_served(name: str, form: str, device: torch.device, tmp_path: Path) -> None:
    pair = make_pair(name, tmp_path, experts=True, moe_intermediate_size=128, head_dim=32)
    for backend in ("torch", "cpu"):
        engine = check_served(backend, pair, device)
    assert engine.executor.model.quantization == form


@pytest.mark.parametrize("name", ["awq", "compressed-tensors W8A8", "fp8 blocks"])
def test_kept_weights_are_what_dora_reads(name: str, tmp_path: Path) -> None:
    """And adapters that replace the head: what `weight` returns is what steps multiply with."""
    folder = convert(write_quantized(tmp_path, name)[0], tmp_path / "target")
    model, kept = load_quantized(folder, dtype=torch.float32)
    served = CpuModel(model, open_checkpoint(folder).config, quantization="none", num_threads=2, kept=kept)
    expected = load_model(folder).state_dict()
    for module in (*adaptable_modules(open_checkpoint(folder).config), "lm_head"):
        torch.testing.assert_close(served.weight(module), expected[f"{module}.weight"], rtol=3e-7, atol=1e-8)


def test_another_quantization_starts_from_the_dequantized_weights(tmp_path: Path) -> None:
    folder = convert(write_quantized(tmp_path, "awq")[0], tmp_path / "target")
    config = open_checkpoint(folder).config
    model, kept = load_quantized(folder, dtype=torch.float32)
    served = CpuModel(model, config, quantization="int8", num_threads=2, kept=kept)
    expected = CpuModel(load_model(folder), config, quantization="int8", num_threads=2)
    module = "model.layers.1.mlp.down_proj"
    assert served.quantization == "int8" and torch.equal(served.weight(module), expected.weight(module))
    same = CpuModel(model, config, quantization="int4", num_threads=2, kept=kept)  # the same bits, an int8 head
    exact = load_model(folder).state_dict()
    torch.testing.assert_close(same.weight(module), exact[f"{module}.weight"], rtol=3e-7, atol=1e-8)
    assert torch.equal(same.weight("lm_head"), expected.weight("lm_head"))


@pytest.fixture
def own_stream(device: torch.device) -> Iterator[None]:
    pytest.importorskip("triton", reason="Triton is not installed")
    from tests.support.gpu.gpu_engine import own_stream

    with own_stream(device):
        yield


@pytest.mark.usefixtures("own_stream")
@pytest.mark.parametrize("name", ON_A_GPU)
def test_gpu_kernels_give_the_logits_of_the_dequantized_weights(
    name: str, device: torch.device, tmp_path: Path
) -> None:
    engine = check_served("triton", make_pair(name, tmp_path, num_hidden_layers=1), device, LENGTH - 1)
    is_dequantized = FORMATS[name].form is None or "groups of 16" in name
    assert engine.steps.model.quantization == ("none" if is_dequantized else FORMATS[name].form)


@pytest.mark.parametrize("name", ["awq", "compressed-tensors W8A8", "fp8 blocks", "fp8 matrices", "nf4"])
def test_gpu_keeps_the_weights_that_dora_reads(name: str, device: torch.device, tmp_path: Path) -> None:
    """As `test_kept_weights_are_what_dora_reads`; parts of stacked matrices."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from stellarbyte.backends.gpu.model import TritonModel

    folder = convert(write_quantized(tmp_path, name)[0], tmp_path / "target")
    model, kept = load_quantized(folder, dtype=torch.float32, device=device)
    config = open_checkpoint(folder).config
    served = TritonModel(model, config, kept=kept)
    expected = load_model(folder).state_dict()
    for module in (*adaptable_modules(config), "lm_head"):
        torch.testing.assert_close(served.weight(module).cpu(), expected[f"{module}.weight"], rtol=3e-7, atol=1e-8)


def test_gpu_rounds_to_int4_what_is_not_kept(device: torch.device, tmp_path: Path) -> None:
    """The nearest numbers with real zero points; the head in int8. Kept int4 is not rounded again, another form is."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from stellarbyte.backends.gpu.model import TritonModel

    grid, module = Grid(kind="int4", zero_points="real"), "model.layers.1.mlp.down_proj"
    for name, is_same in (("awq", True), ("compressed-tensors W8A8", False), ("nf4", False)):
        folder = convert(write_quantized(tmp_path / name, name)[0], tmp_path / name / "target")
        model, kept = load_quantized(folder, dtype=torch.float32, device=device)
        served = TritonModel(model, open_checkpoint(folder).config, quantization="int4", kept=kept)
        plain = load_model(folder).state_dict()
        expected = plain[f"{module}.weight"]
        if not is_same:
            expected = grid.round(expected, grid.fit(expected))
        assert served.quantization == "int4"
        torch.testing.assert_close(served.weight(module).cpu(), expected, rtol=3e-7, atol=1e-8)
        head = plain["lm_head.weight"]
        error = (served.weight("lm_head").cpu() - head).abs().amax(1) / head.abs().amax(1)
        assert 0 < error.max() <= 0.51 / 127


def test_gpu_refuses_experts_in_int4_and_dequantizes_those_that_are_kept(device: torch.device, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from stellarbyte.backends.gpu.model import TritonModel

    options = {"experts": True, "moe_intermediate_size": 128, "head_dim": 32}
    for name, form in (("awq", "none"), ("compressed-tensors W8A8", "int8")):
        folder = convert(write_quantized(tmp_path / name, name, **options)[0], tmp_path / name / "target")
        config = open_checkpoint(folder).config
        model, kept = load_quantized(folder, dtype=torch.float32, device=device)
        layers = enumerate(TritonModel(model, config, kept=kept).layers)
        number, experts = next((i, layer.experts.experts) for i, layer in layers if layer.experts is not None)
        down = experts.down
        assert (down.scales_EN is None) == (form == "none")
        numbers = down.matrix_ENK.float() * (1 if down.scales_EN is None else down.scales_EN[..., None])
        expected = load_model(folder).state_dict()[f"model.layers.{number}.mlp.experts.down_proj"]
        torch.testing.assert_close(numbers.cpu(), expected, rtol=3e-7, atol=1e-8)
        with pytest.raises(ValueError, match="do not support experts in int4"):
            TritonModel(load_quantized(folder, dtype=torch.float32)[0], config, quantization="int4", kept=kept)

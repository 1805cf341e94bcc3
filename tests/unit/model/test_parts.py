"""The table of a layer's parts: a made-up part reaches every reader, and what the table says of shards is true."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.gpu.workloads import RANK, TINY, write_adapters
from stellarbyte.backends.cpu_model import CpuModel, fits
from stellarbyte.backends.torch_model import TorchModel
from stellarbyte.checkpoint.convert import make_plan
from stellarbyte.checkpoint.shapes import expected_shapes
from stellarbyte.config import ByteModelConfig
from stellarbyte.lora.bank import LoraBank, pack_adapter
from stellarbyte.model import parts
from stellarbyte.model.attention import plain_projection
from stellarbyte.model.decoder import ByteDecoderLayer
from stellarbyte.model.parts import ATTENTION_INPUT, MLP_INPUT, Part, linears_by_input, model_parts
from tests.support.engines.engine import Backend, ModelEngine
from tests.support.models import oracle
from tests.support.models.adapters import merged, random_adapter
from tests.support.models.byte_transformer import EXPERTS, make_config, make_model, random_tokens
from tests.support.models.gguf_files import write_gguf
from tests.support.models.hugging_face import tiny_llama

ROWS = 24
NAME = "self_attn.g_proj"
MODULE = f"model.layers.1.{NAME}"


def made_up(**fields: object) -> Part:
    """A projection that only the second layer has, beside q, k and v."""
    given = {
        "name": NAME,
        "kind": "linear",
        "shape": lambda config, _: (ROWS, config.hidden_size),
        "exists": lambda _, layer: layer == 1,
        "has_bias": lambda config, _: config.attention_bias,
        "reads": ATTENTION_INPUT,
        "cut": "out",
        "is_adaptable": True,
        "gguf": "attn_g",
        "hugging_face": "self_attn.gating",
    }
    return Part(**(given | fields))


@pytest.fixture
def with_part(monkeypatch: pytest.MonkeyPatch) -> Callable[[Part], None]:
    return lambda part: monkeypatch.setattr(parts, "PARTS", (*parts.PARTS, part))


@pytest.fixture
def part(with_part: Callable[[Part], None]) -> Part:
    with_part(found := made_up())
    return found


@pytest.mark.usefixtures("part")
def test_the_model_and_its_checkpoint_have_the_part_in_its_layer_only() -> None:
    model = make_model(attention_bias=True)
    shapes = expected_shapes(model.config)
    assert shapes[f"{MODULE}.weight"] == (ROWS, 48) and shapes[f"{MODULE}.bias"] == (ROWS,)
    assert sum("g_proj" in name for name in shapes) == 2
    found = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert found == shapes | {"lm_head.weight": (97, 48)}
    assert model.model.layers[0].self_attn.g_proj is None


@pytest.mark.parametrize(
    "options",
    [
        {"attention_bias": True, "mlp_bias": True, "layer_scale_init": 0.5, "xpos_learnable_scale": True},
        {"router_bias": True, "router_selection_bias": True, "shared_expert_intermediate_size": 8} | EXPERTS,
        {"shared_expert_intermediate_size": 8, "shared_expert_gate": True, "moe_layers": [0, 2]} | EXPERTS,
        {"router_noise": "noisy_top_k", "expert_pools": [1, 1, 0]} | EXPERTS,
        {"softmax_sink": True, "expert_bias": True, "router_bias": True, "expert_pools": [1, 1, 0]} | EXPERTS,
    ],
)
def test_the_model_s_own_order_is_that_of_the_checkpoint(options: dict[str, object]) -> None:
    model = make_model(qk_norm=True, **options)
    assert {name: tuple(parameter.shape) for name, parameter in model.named_parameters()} == expected_shapes(
        model.config
    )
    assert list(expected_shapes(model.config)) == [name for name, _ in model.named_parameters()]


@pytest.mark.usefixtures("part")
def test_the_adapter_bank_holds_the_part() -> None:
    config = make_config()
    adapter = random_adapter(config, seed=1)
    bank = LoraBank(config, 1, 16)
    bank.fill(1, pack_adapter(adapter.weights, adapter.scales, config, torch.float32))
    number = bank.projections.names.index(NAME)
    shared = bank.projections.shared_inputs[ATTENTION_INPUT]
    assert (shared.start, shared.stop - 1) == (0, number) == (0, 3)
    a, b = adapter.weights[MODULE]
    assert torch.equal(bank.a(1, 1, shared)[-len(a) :], a)
    assert torch.equal(bank.b(1, 1, number), (adapter.scales[MODULE] * b).T)
    assert bank.ranks_SLP[1, :, number].tolist() == [0, len(a), 0]
    after = bank.projections.names.index("self_attn.o_proj")
    assert torch.equal(
        bank.b(1, 1, after), (adapter.scales[o := "model.layers.1.self_attn.o_proj"] * adapter.weights[o][1]).T
    )


@pytest.mark.usefixtures("part")
@pytest.mark.parametrize("backend", [TorchModel, partial(CpuModel, quantization="none", num_threads=2)])
def test_a_part_whose_output_is_not_used_changes_nothing(backend: Backend) -> None:
    """The CPU packs it below q, k and v, adapters change it and what is packed beside it."""
    model = make_model(attention_bias=True)
    adapter = random_adapter(model.config, seed=2)
    assert MODULE in adapter.weights
    tokens = random_tokens(20)
    expected = oracle.logprobs(merged(model, adapter).state_dict(), model.config, tokens)
    engine = ModelEngine(model, backend=backend, adapters={"a": adapter})
    assert (engine.teacher_forced(tokens, 10, adapter="a") - expected[9:]).abs().max() <= 1e-4


@pytest.mark.usefixtures("part")
def test_the_cpu_packs_the_part_below_those_that_read_the_same() -> None:
    model = make_model(attention_bias=True)
    qkv = CpuModel(model, model.config, quantization="none", num_threads=1).layers.qkv
    assert qkv.widths.tolist() == [64, 32, 32, ROWS]
    rows_LNK = qkv.weights.transpose(0, 1, 3, 2).reshape(3, -1, 48)[:, 128 : 128 + ROWS]
    linear = model.get_submodule(MODULE)
    np.testing.assert_array_equal(rows_LNK[1], linear.weight.detach().numpy())
    np.testing.assert_array_equal(qkv.bias_LN[1, 128 : 128 + ROWS], linear.bias.detach().numpy())
    assert not rows_LNK[[0, 2]].any() and not qkv.bias_LN[[0, 2], 128:].any()


@pytest.mark.parametrize(
    "unknown",
    [{"reads": "elsewhere"}, {"kind": "norm", "reads": None, "shape": lambda *_: (48,)}],
    ids=["input", "norm"],
)
def test_what_the_cpu_kernels_have_no_place_for_is_left_to_torch(
    unknown: dict[str, object], with_part: Callable[[Part], None]
) -> None:
    assert fits(make_config())
    with_part(made_up(**unknown))
    assert not fits(make_config())


@pytest.mark.parametrize("options", [{"expert_bias": True}, {"swiglu_limit": 7.0, "swiglu_alpha": 1.702}], ids=str)
def test_experts_as_those_of_gpt_oss_are_left_to_torch(options: dict[str, object]) -> None:
    assert not fits(make_config(**options, **EXPERTS))


def test_the_gpu_packs_the_part_below_those_that_read_the_same(
    device: torch.device, with_part: Callable[[Part], None]
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from stellarbyte.backends.gpu.adapters import Adapters, SideStream
    from stellarbyte.backends.gpu.model import TritonModel
    from stellarbyte.ops.triton.lora import LoraRows, LoraScratch

    with_part(made_up(name="mlp.g_proj", reads=MLP_INPUT))
    model = make_model(attention_bias=True).to(device)
    config, module = model.config, "model.layers.1.mlp.g_proj"
    linear = model.get_submodule(module)
    weight, bias = linear.weight.clone(), linear.bias.clone()
    adapter = random_adapter(config, seed=2)
    bank = LoraBank(config, 1, 16, device=device)
    bank.fill(1, pack_adapter(adapter.weights, adapter.scales, config, torch.float32))
    layers = TritonModel(model, config, bank).layers
    assert [len(layer.gate_up.matrix_NK) for layer in layers] == [160, 160 + ROWS, 160]
    assert torch.equal(layers[1].gate_up.matrix_NK[160:], weight) and torch.equal(layers[1].gate_up.bias_N[160:], bias)
    assert not layers[1].gate_up.bias_N[:160].any()

    x_TC = torch.randn(2, config.hidden_size, device=device)
    numbers = (torch.tensor([n], dtype=torch.int32, device=device) for n in (0, 2, 1))
    rows = LoraRows(*numbers, torch.tensor([1.0, 0.5], device=device))
    for layer in (0, 1):
        adapters = Adapters(bank, rows, LoraScratch.make(2, 16, device), SideStream(bank, 2))
        projections = bank.projections.shared_inputs[MLP_INPUT]
        adapters.begin(x_TC, layer, projections)
        delta_TN = adapters.end(x_TC, layer, projections).delta_TN
        added = []
        for name in ("gate_proj", "up_proj", "g_proj") if layer == 1 else ("gate_proj", "up_proj"):
            (a, b), scale = adapter.weights[path := f"model.layers.{layer}.mlp.{name}"], adapter.scales[path]
            added.append(scale * (x_TC @ a.T.to(device) @ b.T.to(device)) * rows.scales_T[:, None])
        torch.testing.assert_close(delta_TN, torch.cat(added, dim=1), atol=1e-5, rtol=1e-5)


def test_what_the_gpu_kernels_have_no_place_for_is_refused(with_part: Callable[[Part], None]) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from stellarbyte.backends.gpu.model import TritonModel

    with_part(made_up(reads="elsewhere"))
    with pytest.raises(ValueError, match=f"the GPU kernels do not support {NAME}"):
        TritonModel(make_model(), make_config())


@pytest.mark.usefixtures("part")
def test_gguf_files_name_the_part(tmp_path: Path) -> None:
    matrix = np.random.default_rng(0).random((ROWS, 32), np.float32)
    file = write_gguf(
        tmp_path / "model.gguf", tiny_llama(tmp_path / "source"), extra_tensors={"blk.1.attn_g.weight": matrix}
    )
    assert make_plan(file).tensors[f"{MODULE}.weight"].read().numpy().tolist() == matrix.tolist()


def test_gguf_files_of_llama_store_its_rotated_heads_interleaved(
    tmp_path: Path, with_part: Callable[[Part], None]
) -> None:
    with_part(made_up(rotated_heads=lambda _: 3))
    matrix = np.arange(ROWS, dtype=np.float32)[:, None].repeat(32, 1)
    file = write_gguf(
        tmp_path / "model.gguf", tiny_llama(tmp_path / "source"), extra_tensors={"blk.1.attn_g.weight": matrix}
    )
    order = make_plan(file).tensors[f"{MODULE}.weight"].read()[:, 0].int().tolist()
    assert order[:8] == [0, 2, 4, 6, 1, 3, 5, 7] and order[16:] == [16, 18, 20, 22, 17, 19, 21, 23]


@pytest.mark.usefixtures("part")
def test_hugging_face_folders_name_the_part(tmp_path: Path) -> None:
    file = tiny_llama(tmp_path / "source") / "model.safetensors"
    matrix = torch.rand(ROWS, 32)
    save_file(load_file(file) | {"model.layers.1.self_attn.gating.weight": matrix}, file, {"format": "pt"})
    assert torch.equal(make_plan(file.parent).tensors[f"{MODULE}.weight"].read(), matrix)


@pytest.mark.usefixtures("part")
def test_the_benchmarks_adapters_change_the_part(tmp_path: Path) -> None:
    (folder,) = write_adapters(TINY, tmp_path, 1)
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors[f"base_model.model.{MODULE}.lora_A.weight"].shape == (RANK, TINY.hidden_size)
    assert tensors[f"base_model.model.{MODULE}.lora_B.weight"].shape == (ROWS, RANK)
    assert "g_proj" in json.loads((folder / "adapter_config.json").read_text())["target_modules"]


def test_linears_with_one_input_are_together_wherever_they_stand_in_the_table(part: Part) -> None:
    groups = linears_by_input(model_parts(make_config()))
    assert groups[ATTENTION_INPUT][-1] is part
    assert [len(group) for group in groups.values()] == [4, 1, 2, 1]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_ranks_that_hold_their_share_of_a_layer_give_its_branches_together(num_ranks: int) -> None:
    config = make_config(qk_norm=True)
    whole = make_model(qk_norm=True).model.layers[0]
    share = make_config(
        qk_norm=True,
        num_attention_heads=config.num_attention_heads // num_ranks,
        num_key_value_heads=config.num_key_value_heads // num_ranks,
        intermediate_size=config.intermediate_size // num_ranks,
    )
    x_TC = torch.randn(5, config.hidden_size)
    totals = [torch.zeros_like(x_TC), torch.zeros_like(x_TC)]
    for rank in range(num_ranks):
        layer = ByteDecoderLayer(share, 0)
        for part in parts.layer_parts(config, 0):
            weight = whole.get_parameter(f"{part.name}.weight")
            if part.cut is not None:
                weight = weight.chunk(num_ranks, {"out": 0, "in": 1}[part.cut])[rank]
            layer.get_submodule(part.name).load_state_dict({"weight": weight})
        for total, branch in zip(totals, branches(layer, share, x_TC), strict=True):
            total += branch
    for total, branch in zip(totals, branches(whole, config, x_TC), strict=True):
        torch.testing.assert_close(total, branch, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def branches(layer: ByteDecoderLayer, config: ByteModelConfig, x_TC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    def attend(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _sink: None) -> torch.Tensor:
        q, k, v = (
            q.transpose(0, 1),
            *(
                t.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, 1).transpose(0, 1)
                for t in (k, v)
            ),
        )
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1)

    return layer.self_attn(x_TC, attend, plain_projection), layer.mlp(x_TC, plain_projection)

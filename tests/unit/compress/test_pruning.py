"""Inner channels and weights removed by magnitude: smaller models against masked ones."""

from pathlib import Path

import pytest
import torch

from stellarbyte.checkpoint.convert import convert
from stellarbyte.checkpoint.native import load_model, open_checkpoint
from stellarbyte.compress import (
    CompressError,
    Pruning,
    Quantization,
    Texts,
    compress,
    head_importance,
    heads_to_keep,
    prune_heads,
    prune_neurons,
    prune_weights,
)
from tests.support.models.byte_transformer import EXPERTS, make_model, random_tokens
from tests.support.models.hugging_face import tiny_llama


@torch.no_grad()
def logits(model: object) -> torch.Tensor:
    return model(torch.tensor([random_tokens(30)])).logits  # type: ignore[operator]


def zero_smallest_channels(model: object, num_removed: int) -> None:
    """Rows of up that are 0 make channels 0, whatever their gates are."""
    for layer in model.model.layers:  # type: ignore[attr-defined]
        mlp = layer.mlp
        weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T)
        sizes = sum(weight.detach().double().square().sum(dim=1) for weight in weights)
        smallest = sizes.argsort()[:num_removed]
        mlp.up_proj.weight.data[smallest] = 0
        if mlp.up_proj.bias is not None:
            mlp.up_proj.bias.data[smallest] = 0


@pytest.mark.parametrize(
    ("inner", "kept"),
    [(80, 56), (192, 192), (256, 192)],  # 0.7 of them; whole groups of 64 stay whole
)
def test_a_smaller_model_computes_what_a_masked_one_does(inner: int, kept: int) -> None:
    model = make_model(intermediate_size=inner, mlp_bias=True, tie_word_embeddings=True)
    small = prune_neurons(model, 0.3)
    assert small.config.intermediate_size == kept and model.config.intermediate_size == inner
    assert small.model.layers[2].mlp.down_proj.weight.shape == (48, kept)
    zero_smallest_channels(model, inner - kept)
    torch.testing.assert_close(logits(small), logits(model), rtol=1e-4, atol=1e-4)
    small.model.layers[0].mlp.up_proj.weight.data.zero_()  # nothing is shared
    assert model.model.layers[0].mlp.up_proj.weight.abs().sum() > 0


def test_layers_with_experts_keep_them() -> None:
    small = prune_neurons(make_model(**EXPERTS, moe_layers=[1]), 0.5)
    assert small.model.layers[1].mlp.experts.down_proj.shape == (6, 48, 24)
    assert small.model.layers[0].mlp.down_proj.weight.shape == (48, 40)
    with pytest.raises(ValueError, match="every layer of this model has experts"):
        prune_neurons(make_model(**EXPERTS), 0.5)


def test_the_smallest_weights_become_zero() -> None:
    model = make_model(**EXPERTS, moe_layers=[1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prune_weights(model, 0.25)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        is_matrix = name.endswith("proj.weight") or "experts." in name
        if not is_matrix:
            assert torch.equal(after[name], tensor), name
            continue
        limit = tensor.abs().flatten().sort().values[round(0.25 * tensor.numel()) - 1]
        assert torch.equal(after[name], torch.where(tensor.abs() <= limit, 0, tensor)), name


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruning")
    tiny_llama(folder / "source", hidden_size=128, intermediate_size=256, initializer_range=0.1, dtype=torch.bfloat16)
    return convert(folder / "source", folder / "model")


IDS = torch.randint(3, 300, (12, 32), generator=torch.Generator().manual_seed(0))
TEXTS = Texts(calibration_BT=IDS[:8], held_out_BT=IDS[8:], num_left_out=0, source="random")


def test_only_pruned_models_keep_their_dtype(source: Path, tmp_path: Path) -> None:
    """Heads by the importance that the calibration text gives them."""
    report = compress(source, tmp_path / "small", TEXTS, quantization=None, pruning=Pruning(heads=0.5, neurons=0.25))
    small, model = load_model(tmp_path / "small", dtype=torch.float32), load_model(source, dtype=torch.float32)
    checkpoint = open_checkpoint(tmp_path / "small")
    assert (small.config.num_attention_heads, small.config.intermediate_size) == (2, 192)
    assert {info.dtype for info in checkpoint.tensors.values()} == {"BF16"} and not checkpoint.quantized
    batches = [{"input_ids": IDS[:4]}, {"input_ids": IDS[4:8]}]
    expected = prune_neurons(
        prune_heads(model, heads_to_keep(head_importance(model, batches), model.config, 0.5)), 0.25
    )
    torch.testing.assert_close(small(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)
    assert report.pruning == "heads=0.5, neurons=0.25" and report.method == "none"


@pytest.mark.parametrize("method", ["round", "gptq", "awq"])
def test_weights_stay_zero_when_they_are_quantized(method: str, source: Path, tmp_path: Path) -> None:
    settings = Quantization(method=method)  # type: ignore[arg-type]
    compress(source, tmp_path / "small", TEXTS, quantization=settings, pruning=Pruning(weights=0.5))
    for name, weight in load_model(tmp_path / "small").named_parameters():
        if name.endswith("proj.weight"):
            assert (weight == 0).float().mean() >= 0.5, name


def test_shares_are_checked() -> None:
    with pytest.raises(CompressError, match=r"prune heads \(1\.0\) must be at least 0 and less than 1"):
        Pruning(heads=1.0)
    for prune in (prune_neurons, prune_weights):
        with pytest.raises(ValueError, match=r"ratio \(-0\.1\)"):
            prune(make_model(), -0.1)

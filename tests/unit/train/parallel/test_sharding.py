"""Runs on ranks that divide the model, against one process that holds it whole."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stellarbyte.checkpoint.native import load_model
from tests.support.models.byte_transformer import make_model
from tests.support.training.processes import MODEL, Ended, run, run_all, steps_of

pytest.importorskip("accelerate")
EXACT = MODEL | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "residual_dropout": 0.0,
    "attention_dropout": 0.0,
    "qk_norm": True,
    "softmax_sink": True,
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
}
EXPERTS = EXACT | {
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "expert_pools": [0, 0],
    "shared_expert_intermediate_size": 16,
    "router_selection_bias": True,
    "router_score": "sigmoid",
    "router_balance_coef": 0.01,
    "tie_word_embeddings": True,
}
# Every gradient is clipped: a wrong norm changes the weights.
TWENTY_STEPS = {"epochs": 4, "checkpoint_every": 20, "evaluate_every": 20, "clip": 0.05}
SIX_STEPS = {"epochs": 1.2, "checkpoint_every": 6, "balance_rate": 0.01, "recompute_every": 2}
HELD_OUT = 5


def assert_equal_runs(found: Path, expected: Path, *, last: int) -> None:
    """Losses, gradient norms, held-out loss, the weights of the last step and their averages, within float noise."""
    steps, expected_steps = steps_of(found), steps_of(expected)
    assert steps.keys() == expected_steps.keys() == set(range(1, last + 1))
    for step, numbers in steps.items():
        assert numbers == pytest.approx(expected_steps[step], rel=2e-5), (found.name, step)
    for file in ("model/model.safetensors", f"checkpoint-{last}/model.safetensors"):
        weights, expected_weights = load_file(found / "run" / file), load_file(expected / "run" / file)
        assert weights.keys() == expected_weights.keys()
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected_weights[name], atol=2e-5, rtol=1e-4, msg=f"{found.name} {name}")


def assert_ended(ended: Ended) -> None:
    assert set(ended.statuses) == {0}, ended.output
    assert "Traceback" not in ended.output, ended.output


def twenty(folder: Path, **parallel: int) -> dict[str, Any]:
    return {"folder": folder, "model": EXACT, "train": TWENTY_STEPS, "held_out": HELD_OUT, "parallel": parallel}


def adapter_of(base: Path, folder: Path, **parallel: int) -> dict[str, Any]:
    train = {"epochs": 1.2, "lr": 0.01}
    return {"folder": folder, "kind": "lora", "model": {"path": str(base)}, "train": train, "parallel": parallel}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps of a model with every part, and an adapter."""
    folder = tmp_path_factory.mktemp("alone")
    assert_ended(run_all([twenty(folder / "dense"), adapter_of(base, folder / "adapter")], ranks=1))
    return folder


@pytest.fixture(scope="module")
def divided(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two ranks that divide the parameters."""
    folder = tmp_path_factory.mktemp("divided")
    runs = [twenty(folder / "dense", fsdp=2), adapter_of(base, folder / "adapter", fsdp=2)]
    assert_ended(run_all(runs, ranks=2))
    return folder


def test_two_ranks_that_divide_the_parameters(alone: Path, divided: Path) -> None:
    assert_equal_runs(divided / "dense", alone / "dense", last=20)
    model = load_model(divided / "dense" / "run" / "model")  # an ordinary folder, as the server loads
    assert type(model).__name__ == "ByteTransformer" == model.config.architectures[0]
    assert (divided / "dense" / "run" / "model" / "README.md").is_file()


@pytest.mark.slow
def test_four_ranks_in_every_layout(alone: Path, tmp_path: Path) -> None:
    """Parameters in four parts; in two, twice; layers in two parts, twice; both in two."""
    layouts = [{"fsdp": 4}, {"fsdp": 2}, {"tensor": 2}, {"fsdp": 2, "tensor": 2}]
    folders = [tmp_path / "-".join(f"{name}{number}" for name, number in layout.items()) for layout in layouts]
    assert_ended(run_all([twenty(f, **layout) for f, layout in zip(folders, layouts, strict=True)], ranks=4))
    for folder in folders:
        assert_equal_runs(folder, alone / "dense", last=20)


@pytest.mark.slow
def test_experts_under_both(tmp_path: Path) -> None:
    """Layers share a pool of experts, recompute them, and move the biases that choose them."""
    layouts = [{"fsdp": 2}, {"tensor": 2}]
    runs = [
        {"folder": tmp_path / next(iter(layout)), "model": EXPERTS, "train": SIX_STEPS, "parallel": layout}
        for layout in layouts
    ]
    assert_ended(run_all(runs, ranks=2))
    assert_ended(run(tmp_path / "alone", model=EXPERTS, train=SIX_STEPS))
    for each in runs:
        assert_equal_runs(each["folder"], tmp_path / "alone", last=6)


def test_an_adapter_of_a_base_in_parts(alone: Path, divided: Path) -> None:
    found, expected = (
        load_file(folder / "adapter/run/adapter/adapter_model.safetensors") for folder in (divided, alone)
    )
    assert found.keys() == expected.keys() and len(found) > 10
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=1e-4, msg=name)

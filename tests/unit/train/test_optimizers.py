"""Every trainable parameter has one optimizer; learning rates follow their formulas; states are continued exactly."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from stellarbyte.train.arguments import Schedule, training_arguments
from stellarbyte.train.config.run import Stop, Train
from stellarbyte.train.errors import TrainError
from stellarbyte.train.optimizers import TwoOptimizers, make_optimizer, parameter_groups
from tests.support.models.byte_transformer import EXPERTS, make_model, random_tokens

TOKENS = torch.tensor([random_tokens(20)])


def settings(**changes: Any) -> Train:
    return Train.model_validate({"batch_tokens": 192, "micro_batch": 2, "lr": 0.01} | changes)


@pytest.mark.parametrize("uses_muon", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"tie_word_embeddings": True, "attention_bias": True, "layer_scale_init": 0.1}]
)
def test_groups_partition_the_parameters(uses_muon: bool, options: dict[str, Any]) -> None:
    model = make_model(qk_norm=True, **options)
    model.model.norm.weight.requires_grad_(False)
    groups = parameter_groups(model, uses_muon=uses_muon)
    grouped = [id(parameter) for group in groups.values() for parameter in group]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    orthogonal = {names[id(parameter)] for parameter in groups["orthogonal"]}
    linears = {
        f"{name}.weight" for name, m in model.named_modules() if "layers" in name and isinstance(m, torch.nn.Linear)
    }
    assert orthogonal == (linears if uses_muon else set())
    assert all("norm" in names[id(p)] or names[id(p)].endswith(("bias", "scale.weight")) for p in groups["kept"])


def test_muon_steps_are_orthogonal_and_of_the_size_of_adamws() -> None:
    """U Vᵀ of the momentum, times 0.2 · sqrt(the larger side) · lr (Liu et al. 2025). Newton-Schulz brings singular
    values that are not tiny between 0.68 and 1.13 (Jordan et al. 2024)."""
    model = make_model()
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = weight.detach().clone()
    optimizer = make_optimizer(model, settings(optimizer="muon", weight_decay=0.0))
    model(TOKENS, labels=TOKENS).loss.backward()
    u, values, vh = torch.linalg.svd(weight.grad.double(), full_matrices=False)
    optimizer.step()
    step = (before - weight.detach()).double() / (0.01 * 0.2 * math.sqrt(max(weight.shape)))
    along = u.T @ step @ vh.T
    large = int((values > 0.1 * values[0]).sum())
    assert large >= 5
    assert ((along.diag()[:large] > 0.6) & (along.diag()[:large] < 1.25)).all()
    assert (along[:large, :large] - along[:large, :large].diag().diag()).abs().max() < 0.1


def test_muon_refuses_stacks_of_matrices() -> None:
    with pytest.raises(
        TrainError, match=r"muon is for matrices, but model.layers.0.mlp.experts.gate_up_proj is a stack"
    ):
        make_optimizer(make_model(**EXPERTS), settings(optimizer="muon"))


def test_two_optimizers_are_continued_exactly_and_share_the_learning_rate(tmp_path: Path) -> None:
    def trained(steps: int, saved: Path | None = None) -> list[torch.Tensor]:
        model = make_model()
        optimizer = make_optimizer(model, settings(optimizer="muon"))
        assert isinstance(optimizer, TwoOptimizers)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        if saved is not None and saved.exists():
            state = torch.load(saved, weights_only=True)
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            model.load_state_dict(state["model"])
        for _ in range(steps):
            optimizer.zero_grad()
            model(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
            schedule.step()
        rates = [group["lr"] for inner in optimizer.optimizers for group in inner.param_groups]
        assert rates == pytest.approx([0.01 / (1 + schedule.last_epoch)] * 3)
        if saved is not None and not saved.exists():
            state = {
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "model": model.state_dict(),
            }
            torch.save(state, saved)
        return [parameter.detach() for parameter in model.parameters()]

    whole = trained(4)
    trained(2, tmp_path / "state.pt")
    continued = trained(2, tmp_path / "state.pt")
    assert all(torch.equal(a, b) for a, b in zip(whole, continued, strict=True))


SCHEDULES = {  # of the share of the steps after the warm-up
    "cosine": (1, lambda share: 0.5 * (1 + math.cos(math.pi * share))),
    "cosine_with_restarts": (3, lambda share: 0.5 * (1 + math.cos(math.pi * ((3 * share) % 1)))),
    "linear": (1, lambda share: 1 - share),
    "constant": (1, lambda _share: 1.0),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_follow_their_formulas(name: str, tmp_path: Path) -> None:
    cycles, formula = SCHEDULES[name]
    plan = Schedule(batch_rows=8, accumulated=4, num_steps=40)
    told = settings(schedule=name, cycles=cycles, warmup=5)
    arguments = training_arguments(
        told, Stop(), folder=tmp_path, seed=0, track=[], workers=0, plan=plan, evaluates=False
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    schedule = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=arguments.get_warmup_steps(arguments.max_steps),
        num_training_steps=arguments.max_steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    for step in range(40):
        expected = step / 5 if step < 5 else formula((step - 5) / 35)
        assert abs(schedule.get_last_lr()[0] - 0.01 * expected) < 1e-12
        optimizer.step()
        schedule.step()

"""The routers' auxiliary losses against float64 formulas and transformers' own, and their way into the loss."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from stellarbyte import ByteTransformer
from stellarbyte.model.moe.losses import RouterLosses, router_losses, router_sums
from stellarbyte.model.moe.router import Routing
from tests.support.models.byte_transformer import EXPERTS, make_model, random_tokens
from tests.support.models.routers import hidden_states, make_router

COEFFICIENTS = {
    "router_balance_coef": 0.3, "router_z_coef": 0.01, "router_entropy_coef": 0.2, "router_load_coef": 0.7,
}  # fmt: skip
FIELDS = RouterLosses._fields[:-1]


def losses_of(routings: list[Routing], is_token_T: torch.Tensor | None = None) -> RouterLosses:
    return router_losses([router_sums(routing, is_token_T) for routing in routings])


@pytest.mark.parametrize("has_padding", [False, True])
def test_balance_is_transformers_load_balancing_loss(has_padding: bool) -> None:
    """Of each layer by itself; the model's is the mean over layers."""
    routings = [make_router(num_experts_per_tok=k)(hidden_states()) for k in (2, 2)]
    routings[1] = make_router(num_experts_per_tok=2)(-2 * hidden_states())
    mask = (torch.arange(40) % 3 > 0).int()[None] if has_padding else None
    expected = [load_balancing_loss_func((routing.logits_TE,), 7, 2, mask) for routing in routings]
    found = losses_of(routings, None if mask is None else mask[0].bool())
    torch.testing.assert_close(found.balance_loss, torch.stack(expected).mean(), atol=1e-6, rtol=1e-6)
    assert not torch.isclose(expected[0], expected[1], atol=1e-3)


def float64_losses(routing: Routing, is_token_T: torch.Tensor, k: int) -> tuple[float, float, float, list[float]]:
    """z, entropy of the gates, divergence of the load, and the load of each expert, token by token."""
    tokens = [t for t in range(len(is_token_T)) if is_token_T[t]]
    logits = routing.logits_TE.double().tolist()
    num_experts = len(logits[0])
    z = sum(math.log(sum(map(math.exp, logits[t]))) ** 2 for t in tokens) / len(tokens)
    gates, load, choices = ([0.0] * num_experts for _ in range(3))
    for t in tokens:
        for e, gate in zip(routing.experts_TK[t].tolist(), routing.gates_TK[t].tolist(), strict=True):
            gates[e] += gate
            choices[e] += 1 / len(tokens)
        for e in range(num_experts):
            load[e] += chance_of(routing, t, e, k)
    shares = [value / sum(gates) for value in gates]
    load = [value / sum(load) for value in load]
    entropy = -sum(value * math.log(value) for value in shares if value)
    return z, entropy, sum(value * math.log(value * num_experts) for value in load if value), choices


def chance_of(routing: Routing, t: int, e: int, k: int) -> float:
    """Shazeer et al. 2017, appendix A, with noise; the probability without."""
    if routing.noisy_logits_TE is None or routing.noise_scale_TE is None:
        return float(routing.scores_TE[t, e].detach().double() / routing.scores_TE[t].detach().double().sum())
    noisy = routing.noisy_logits_TE[t].double().tolist()
    limit = sorted(noisy[:e] + noisy[e + 1 :], reverse=True)[k - 1]
    return 0.5 * (1 + math.erf((float(routing.logits_TE[t, e]) - limit) / float(routing.noise_scale_TE[t, e]) / 2**0.5))


@pytest.mark.parametrize("options", [{}, {"router_score": "sigmoid"}, {"router_noise": "noisy_top_k"}], ids=str)
def test_the_other_losses_are_those_of_a_float64_loop(options: dict[str, Any]) -> None:
    router = make_router(num_experts_per_tok=2, **options).train()
    routings = [router(scale * hidden_states()) for scale in (1, 3)]
    is_token_T = torch.arange(40) % 5 > 0
    expected = [float64_losses(routing, is_token_T, 2) for routing in routings]
    found = losses_of(routings, is_token_T)
    for name, values in zip(
        ("z_loss", "router_entropy", "load_kl"), list(zip(*expected, strict=True))[:3], strict=True
    ):
        assert float(getattr(found, name)) == pytest.approx(sum(values) / 2, rel=1e-4, abs=1e-6), name
    torch.testing.assert_close(found.expert_load, torch.tensor([choices for *_, choices in expected]))


def test_an_even_load_has_the_best_losses() -> None:
    router = make_router(num_experts_per_tok=7)
    torch.nn.init.zeros_(router.weight)
    found = losses_of([router(hidden_states())])
    assert float(found.balance_loss) == pytest.approx(7) and float(found.load_kl) == pytest.approx(0, abs=1e-6)
    assert float(found.router_entropy) == pytest.approx(math.log(7))


def train_model(**options: Any) -> ByteTransformer:
    return make_model(**(EXPERTS | {"moe_layers": [0, 2]} | options)).train()


TOKENS = torch.tensor([random_tokens(30), random_tokens(30, seed=1)])


def test_the_training_loss_is_the_sum_and_the_evaluation_loss_is_not() -> None:
    plain = train_model()(TOKENS, labels=TOKENS)
    model = train_model(**COEFFICIENTS)
    out = model(TOKENS, labels=TOKENS)
    for name in FIELDS:
        assert torch.equal(out[name], plain[name])
    added = 0.3 * out.balance_loss + 0.01 * out.z_loss - 0.2 * out.router_entropy + 0.7 * out.load_kl
    torch.testing.assert_close(out.loss, plain.loss + added)
    assert out.expert_load.shape == (2, 6)
    torch.testing.assert_close(out.expert_load.sum(dim=1), torch.tensor([2.0, 2.0]))
    assert torch.equal(model.eval()(TOKENS, labels=TOKENS).loss, plain.loss)
    assert model(TOKENS).balance_loss is None  # nor is it computed


def test_accumulated_batches_add_the_auxiliary_losses_once() -> None:
    model = train_model(**COEFFICIENTS)
    whole = model(TOKENS[:1], labels=TOKENS[:1]).loss
    parts = [model(TOKENS[:1], labels=TOKENS[:1], num_items_in_batch=58).loss for _ in range(2)]
    torch.testing.assert_close(parts[0] + parts[1], whole)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"capacity_factor": 0.6}], ids=str)
def test_padding_is_left_out(side: str, options: dict[str, Any]) -> None:
    model = train_model(**options)
    row = torch.tensor([random_tokens(30)])
    alone = model(row, labels=row)
    padding = torch.full((1, 11), 5)
    pieces = [padding, row] if side == "left" else [row, padding]
    mask = torch.cat([torch.full_like(piece, int(piece is row)) for piece in pieces], dim=1)
    labels = torch.cat([row if piece is row else torch.full_like(piece, -100) for piece in pieces], dim=1)
    labels[:, 11] = -100 if side == "left" else labels[:, 11]  # the first token, which padding would predict
    padded = model(torch.cat(pieces, dim=1), attention_mask=mask, labels=labels)
    for name in ("loss", *FIELDS, "expert_load"):
        torch.testing.assert_close(padded[name], alone[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"router_noise": "noisy_top_k"}, {"capacity_factor": 0.8}], ids=str)
def test_gradient_checkpointing_counts_once(options: dict[str, Any]) -> None:
    results = []
    for checkpointing in ("none", "of training runs", "of transformers"):
        model = train_model(**COEFFICIENTS, **options)
        if checkpointing == "of training runs":
            model._set_gradient_checkpointing(every_n_layers=1)
        elif checkpointing == "of transformers":
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        torch.manual_seed(7)
        out = model(TOKENS, labels=TOKENS)
        out.loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        results.append([out[name] for name in ("loss", *FIELDS)] + gradients)
    for plain, *others in zip(*results, strict=True):
        for recomputed in others:
            torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


def test_every_loss_has_a_gradient_that_lowers_it() -> None:
    """Through the router alone, whose choices hardly change in a small step."""
    for field in FIELDS:
        model = train_model()
        before = model(TOKENS, labels=TOKENS)
        before[field].backward()
        with torch.no_grad():
            for layer in model.model.layers:
                if hasattr(layer.mlp, "gate"):
                    layer.mlp.gate.weight -= 0.01 * layer.mlp.gate.weight.grad / layer.mlp.gate.weight.grad.norm()
            after = model(TOKENS, labels=TOKENS)
        assert float(after[field]) < float(before[field]) - 1e-4, field


def test_transformers_trainer_trains_and_evaluates(tmp_path: Path) -> None:
    """With accumulated batches and recomputed layers; the losses of routers are no predictions of its evaluation."""
    pytest.importorskip("accelerate")
    rows = [{"input_ids": row, "labels": row} for row in (random_tokens(20, seed=seed) for seed in range(8))]
    options = {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    arguments = TrainingArguments(
        str(tmp_path), **options, report_to=[], use_cpu=True, gradient_checkpointing=True, logging_steps=1
    )
    model = train_model(**COEFFICIENTS, capacity_factor=1.25, router_noise="gumbel")
    before = model.model.layers[0].mlp.gate.weight.clone()
    trainer = Trainer(model, arguments, train_dataset=rows)
    assert math.isfinite(trainer.train().training_loss)
    assert not torch.equal(model.model.layers[0].mlp.gate.weight, before)
    assert trainer.predict(rows[:3]).predictions.shape == (3, 20, model.config.vocab_size)


def test_balancing_biases_evens_the_load() -> None:
    model = train_model(router_selection_bias=True, router_score="sigmoid")
    biases = [layer.mlp.gate.e_score_correction_bias for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    for bias in biases:
        torch.nn.init.zeros_(bias)
    before = model(TOKENS, labels=TOKENS).expert_load
    for _ in range(200):
        model.balance_experts(model(TOKENS, labels=TOKENS).expert_load, rate=0.01)
    after = model(TOKENS, labels=TOKENS).expert_load
    assert (after.std(dim=1) < 0.5 * before.std(dim=1)).all()
    assert not any(bias.requires_grad for bias in biases)
    with pytest.raises(ValueError, match="balance_experts needs router_selection_bias"):
        train_model().balance_experts(after, rate=0.01)


def test_the_training_step_reaches_the_routers() -> None:
    options = {"router_top_p": 1.0, "num_experts_per_tok": 6, "router_top_p_start": 0.2, "router_top_p_steps": 10}
    model = train_model(**options)
    loads = []
    for step in (0, 5, 10):
        model.set_training_step(step)
        loads.append(float(model(TOKENS).expert_load.sum(dim=1).mean()))
    assert loads[0] < loads[1] < loads[2] == 6.0

"""The loss without the whole logits, recomputed layers, and what transformers' Trainer needs of the model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from stellarbyte import ByteTransformer
from stellarbyte.model import loss as loss_module
from tests.support.models.byte_transformer import VOCABULARY, make_model, random_tokens

TOKENS = torch.tensor([random_tokens(30), random_tokens(30, seed=1)])
LABELS = TOKENS.clone()
LABELS[0, :11] = -100
OPTIONS: dict[str, Any] = {"tie_word_embeddings": True, "logits_softcap": 3.0, "logits_multiplier": 0.7}


def smoothed_loss(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """From the formula, in the dtype of `logits`."""
    logprobs = logits[:, :-1].log_softmax(dim=-1)
    counted = labels[:, 1:] != -100
    nll = -logprobs.gather(2, labels[:, 1:, None].clamp(min=0))[..., 0]
    uniform = -logprobs.mean(dim=-1)
    return ((1 - smoothing) * nll + smoothing * uniform)[counted].mean()


def gradients(model: ByteTransformer) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk_tokens", [1, 7, 100])
def test_loss_and_gradients_without_logits_are_those_of_float64(
    smoothing: float, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk_tokens * VOCABULARY)
    model, exact = make_model(**OPTIONS).train(), make_model(**OPTIONS).train().double()
    expected = smoothed_loss(exact(TOKENS).logits, LABELS, smoothing)
    expected.backward()
    output = model(TOKENS, labels=LABELS, smoothing=smoothing, skip_logits=True)
    output.loss.backward()
    assert output.logits is None
    assert abs(output.loss.item() - expected.item()) < 1e-5
    for ours, reference in zip(gradients(model), gradients(exact), strict=True):
        torch.testing.assert_close(ours.double(), reference, atol=1e-5, rtol=1e-4)
    with_logits = model(TOKENS, labels=LABELS, smoothing=smoothing)
    assert abs(with_logits.loss.item() - expected.item()) < 1e-5
    last = model(TOKENS, labels=LABELS, smoothing=smoothing, logits_to_keep=1)
    assert last.logits.shape[1] == 1 and abs(last.loss.item() - expected.item()) < 1e-5


def test_the_logits_of_all_tokens_are_never_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 8 * VOCABULARY)
    kept = {}
    for skip_logits in (False, True):
        model = make_model().train()
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            model(TOKENS, labels=LABELS, skip_logits=skip_logits)
        kept[skip_logits] = sum(size for size in sizes if size == TOKENS.numel() * VOCABULARY)
    assert kept[False] > 0 and kept[True] == 0


def test_only_tokens_with_a_target_get_logits() -> None:
    model = make_model().train()
    rows: list[int] = []
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: rows.append(len(inputs[0])))
    model(TOKENS, labels=LABELS, skip_logits=True)
    assert rows == [int((LABELS[:, 1:] != -100).sum())] and rows[0] < TOKENS.numel() - len(TOKENS)
    nothing = model(TOKENS, labels=torch.full_like(LABELS, -100), skip_logits=True, num_items_in_batch=1).loss
    nothing.backward()
    assert nothing.item() == 0 and all(not gradient.any() for gradient in gradients(model))


def test_accumulated_batches_have_the_loss_of_one() -> None:
    model = make_model()
    whole = model(TOKENS, labels=LABELS).loss
    count = int((LABELS[:, 1:] != -100).sum())
    parts = [
        model(TOKENS[row : row + 1], labels=LABELS[row : row + 1], num_items_in_batch=count, skip_logits=True).loss
        for row in range(2)
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_impossible_smoothing_is_refused(smoothing: float) -> None:
    with pytest.raises(ValueError, match=r"smoothing \(.*\) must be at least 0 and less than 1"):
        make_model()(TOKENS, labels=LABELS, smoothing=smoothing)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(str(folder), report_to=[], use_cpu=True, disable_tqdm=True, **options)


def test_transformers_trainer_smooths_the_labels_of_the_next_tokens(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = make_model()
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.2))
    loss = trainer.compute_loss(model, {"input_ids": TOKENS, "labels": LABELS.clone()})
    assert abs(loss.item() - smoothed_loss(model(TOKENS).logits, LABELS, 0.2).item()) < 1e-5


def test_transformers_trainer_evaluates(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = make_model()
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    trainer = Trainer(model, arguments(tmp_path, per_device_eval_batch_size=2), eval_dataset=rows)
    expected = smoothed_loss(model(TOKENS).logits, TOKENS, 0.0)
    assert abs(trainer.evaluate()["eval_loss"] - expected.item()) < 1e-5
    assert trainer.predict(rows).predictions.shape == (2, 30, VOCABULARY)


def test_only_every_nth_layer_is_recomputed() -> None:
    """As the flags say, as the number of forwards of each layer shows, and with the same gradients bit for bit."""
    model = make_model(residual_dropout=0.3).train()
    calls = [0, 0, 0]
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, n=number: calls.__setitem__(n, calls[n] + 1))
    found = []
    for every, flags in ((1, [True] * 3), (2, [True, False, True]), (3, [True, False, False]), (None, [False] * 3)):
        enable_recomputation(model, every)
        assert [layer.gradient_checkpointing for layer in model.model.layers] == flags
        calls[:] = [0, 0, 0]
        model.zero_grad()
        torch.manual_seed(3)
        model(TOKENS, labels=LABELS).loss.backward()
        assert calls == [1 + flag for flag in flags]
        found.append(gradients(model))
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def enable_recomputation(model: ByteTransformer, every: int | None) -> None:
    """Through transformers' own names, which differ by its release."""
    if every is None:
        getattr(model, "activation_checkpointing_disable", model.gradient_checkpointing_disable)()
    elif hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(every_n_layers=every)
    else:
        model._set_gradient_checkpointing(every_n_layers=every)


def test_impossible_recomputation_is_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"every_n_layers \(0\) must be at least 1"):
        model._set_gradient_checkpointing(every_n_layers=0)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    with pytest.raises(ValueError, match="use_reentrant must be False"):
        enable({"use_reentrant": True})

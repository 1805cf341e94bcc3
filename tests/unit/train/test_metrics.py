"""Losses of held-out rows do not depend on the batch size; FLOPs are those of a count by hand."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from stellarbyte.train.data.packing import collate
from stellarbyte.train.errors import TrainError
from stellarbyte.train.metrics import flops_per_token, held_out_loss
from stellarbyte.train.rows import ShuffledStream
from tests.support.models import oracle
from tests.support.models.byte_transformer import make_config, make_model
from tests.support.training.rows import random_rows, run_data

CPU = torch.device("cpu")


def test_the_loss_is_the_same_for_every_batch_size() -> None:
    """Against the oracle of each document alone. A mean of the batches' means would differ in the second digit."""
    model = make_model()
    rows = random_rows(12, 24)
    nll, count = 0.0, 0
    for row in rows.documents:
        for tokens in row:
            logprobs = oracle.logprobs(model.state_dict(), model.config, tokens)[:-1]
            nll += float(F.nll_loss(logprobs, torch.tensor(tokens[1:]), reduction="sum"))
            count += len(tokens) - 1
    means = set()
    for size in (1, 4, 12):
        loader = DataLoader(rows, batch_size=size, collate_fn=collate)
        found = held_out_loss(model, loader, CPU, bytes_per_token=3.0)
        assert found.num_tokens == count
        assert abs(found.loss - nll / count) < 1e-5
        assert abs(found.perplexity - math.exp(nll / count)) < 1e-3
        assert abs(found.bits_per_byte - nll / count / math.log(2) / 3) < 1e-5
        means.add(round(float(torch.stack([model(**batch).loss for batch in loader]).mean()), 3))
    assert len(means) == 3


def test_an_evaluation_changes_neither_the_mode_nor_the_random_numbers() -> None:
    model = make_model().train()
    state = torch.get_rng_state()
    held_out_loss(model, [collate([random_rows(1, 24)[0]])], CPU, bytes_per_token=None)
    assert model.training and torch.equal(torch.get_rng_state(), state)


def test_rows_without_a_token_to_predict_are_refused() -> None:
    batch = collate([random_rows(1, 24)[0]])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with pytest.raises(TrainError, match="held-out data has no token to predict"):
        held_out_loss(make_model(), [batch], CPU, bytes_per_token=None)


@pytest.mark.parametrize("window", [None, 5])
def test_flops_are_those_of_a_count_by_hand(window: int | None) -> None:
    """Every product of a forward pass counted one by one, times 3 for the backward pass."""
    config = make_config(sliding_window=window)
    model = make_model(sliding_window=window)
    sequence = 16
    forward = 0
    for name, parameter in model.named_parameters():
        if "proj" in name or "lm_head" in name:
            forward += 2 * parameter.numel() * sequence
        elif "embed" not in name:
            forward += 2 * parameter.numel() * sequence  # norms: counted with the parameters, as is usual
    for _ in range(config.num_hidden_layers):
        for query in range(sequence):
            keys = query + 1 if window is None else min(query + 1, window)
            forward += 2 * 2 * config.num_attention_heads * config.head_dim * keys
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert abs(flops_per_token(config, parameters, sequence) * sequence / (3 * forward) - 1) < 1e-9


def test_a_stream_reads_every_row_once_an_epoch_in_an_order_of_its_own(tmp_path: Path) -> None:
    data = run_data(tmp_path)
    order = list(ShuffledStream(len(data.train), 100, seed=4))
    epochs = [order[:40], order[40:80], order[80:]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40)) and len(epochs[2]) == 20 == len(set(epochs[2]))
    assert epochs[0] != epochs[1]
    assert list(ShuffledStream(40, 120, seed=4))[:100] == order  # a longer run begins alike
    assert list(ShuffledStream(40, 100, seed=5)) != order

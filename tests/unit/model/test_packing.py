"""Rows of several documents, FlexAttention and compiled forwards, against the oracle of each document alone."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from stellarbyte import ByteTransformer
from stellarbyte.model import dense_attention
from tests.support.cases import each_value_once
from tests.support.models import oracle
from tests.support.models.byte_transformer import EXPERTS, VARIANTS, W, make_model, random_tokens

LENGTHS = [3 * W + 1, 1, W, 5]  # of the documents of one row: longer than the window, one token, the window, shorter
DOCUMENTS = [random_tokens(length, seed=seed) for seed, length in enumerate(LENGTHS)]
ROW = [token for document in DOCUMENTS for token in document]
IDS = [number for number, length in enumerate(LENGTHS) for _ in range(length)]
POSITIONS = [position for length in LENGTHS for position in range(length)]
MASKED = ["llama", "mistral", "qwen2", "xpos", "xpos window sinks", "norms before and after"]


def packed(model: ByteTransformer, **arguments: Any) -> torch.Tensor:
    """Logits [T, V] of the row, after a row of one document."""
    others = random_tokens(len(ROW), seed=9)
    documents = torch.tensor([[0] * len(ROW), IDS], dtype=torch.int32)
    return model(torch.tensor([others, ROW]), document_ids=documents, **arguments).logits[1]


@pytest.mark.parametrize(
    ("variant", "implementation"), each_value_once(list(MASKED), ["sdpa", "eager", "flex_attention"])
)
@torch.no_grad()
def test_a_document_in_a_row_equals_the_document_alone(variant: str, implementation: str) -> None:
    model = make_model(attn_implementation=implementation, **VARIANTS[variant])
    parts = packed(model).double().log_softmax(dim=-1).split(LENGTHS)
    for part, tokens in zip(parts, DOCUMENTS, strict=True):
        expected = oracle.logprobs(model.state_dict(), model.config, tokens)
        assert (part - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("variant", MASKED)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_rows_that_count_from_other_numbers_have_the_same_logits(variant: str, implementation: str) -> None:
    """Scores depend on differences of positions: XPos, RoPE, windows and sinks, whatever number a row starts with."""
    model = make_model(attn_implementation=implementation, **VARIANTS[variant])
    shifted = torch.tensor([POSITIONS, POSITIONS]) + torch.tensor([[3], [90]])
    positions = torch.where(torch.tensor([[True], [False]]), torch.arange(len(ROW)) + 3, shifted)
    found = packed(model, position_ids=positions)
    for part, tokens in zip(found.double().log_softmax(dim=-1).split(LENGTHS), DOCUMENTS, strict=True):
        expected = oracle.logprobs(model.state_dict(), model.config, tokens)
        assert (part - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, packed(model), atol=1e-5, rtol=1e-5)


def test_long_rows_of_documents_stay_exact_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """ζ^(-n/b) of a base far behind would pass float32's maximum at n = 142."""
    monkeypatch.setattr(dense_attention, "XPOS_CHUNK", 64)
    model = make_model(xpos_scale_base=2, max_position_embeddings=512)
    documents = [random_tokens(length, seed=length) for length in (150, 170)]
    ids = torch.tensor([[0] * 150 + [1] * 170])
    logits = model(torch.tensor([documents[0] + documents[1]]), document_ids=ids).logits[0]
    for part, tokens in zip(logits.double().log_softmax(dim=-1).split([150, 170]), documents, strict=True):
        assert (part - oracle.logprobs(model.state_dict(), model.config, tokens)).abs().max() <= 1e-4


def test_position_ids_alone_would_leak() -> None:
    """The reason for document_ids; and positions that contradict them are refused."""
    model = make_model()
    positions = torch.tensor([POSITIONS])
    leaking = model(torch.tensor([ROW]), position_ids=positions, use_cache=False).logits[0]
    assert (leaking - packed(model)).abs().max() > 0.1
    both = model(torch.tensor([ROW]), position_ids=positions, document_ids=torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(both, packed(model), atol=1e-5, rtol=1e-5)
    later = torch.where(torch.tensor([IDS]) > 1, positions + 1, positions)
    with pytest.raises(RuntimeError, match="position_ids must count from the first number of their row"):
        model(torch.tensor([ROW]), position_ids=later, document_ids=torch.tensor([IDS]))
    with pytest.raises(ValueError, match="document_ids take neither attention_mask"):
        model(torch.tensor([ROW]), attention_mask=torch.ones(1, len(ROW)), document_ids=torch.tensor([IDS]))


def test_the_loss_of_packed_documents_is_that_of_each_alone() -> None:
    """The first token of a document is no target, and padding, of a negative id, counts nowhere."""
    model = make_model(**EXPERTS, router_balance_coef=1.0).train()
    ids = torch.tensor([ROW + [0] * 7])
    labels = torch.tensor([ROW + [-100] * 7])
    output = model(ids, labels=labels, document_ids=torch.tensor([IDS + [-1] * 7]))
    expected = sum(
        F.nll_loss(
            oracle.logprobs(model.state_dict(), model.config, tokens)[:-1], torch.tensor(tokens[1:]), reduction="sum"
        )
        for tokens in DOCUMENTS
        if len(tokens) > 1
    )
    loss = output.loss - output.balance_loss
    assert abs(loss.item() - expected.item() / (len(ROW) - len(DOCUMENTS))) < 1e-5
    alone = model(torch.tensor([ROW]), document_ids=torch.tensor([IDS]))
    torch.testing.assert_close(output.expert_load, alone.expert_load)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_flex_attention_sees_no_padding(side: str) -> None:
    model = make_model(attn_implementation="flex_attention", **VARIANTS["xpos window sinks"])
    tokens, padding = random_tokens(2 * W + 1), [0] * 5
    ids = padding + tokens if side == "left" else tokens + padding
    mask = torch.tensor([[int(side == "right")] * 5 + [1] * (2 * W - 4) + [int(side == "left")] * 5])
    logits = model(torch.tensor([ids]), attention_mask=mask, use_cache=False).logits[0][mask[0].bool()]
    expected = oracle.logprobs(model.state_dict(), model.config, tokens)
    assert (logits.double().log_softmax(dim=-1) - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_flex_attention_makes_one_mask_for_layers_with_one_window(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make = dense_attention.flex_attention.block_mask
    monkeypatch.setattr(
        dense_attention.flex_attention, "block_mask", lambda *a, **k: made.append(k["window"]) or make(*a, **k)
    )
    model = make_model(attn_implementation="flex_attention", **VARIANTS["qwen2"])
    model(torch.tensor([ROW]), use_cache=False)
    assert sorted(made, key=str) == [W, None]


def test_flex_attention_has_no_dropout() -> None:
    model = make_model(attn_implementation="flex_attention", attention_dropout=0.1)
    with pytest.raises(ValueError, match="attention_dropout needs attn_implementation sdpa or eager"):
        model.train()(torch.tensor([ROW]))


@pytest.mark.parametrize(
    ("variant", "extra"),
    each_value_once(
        ["mistral", "xpos window sinks"], ["attention_mask", "position_ids", "document_ids", "all tokens are there"]
    ),
)
def test_a_compiled_forward_is_one_graph(variant: str, extra: str) -> None:
    model = make_model(**VARIANTS[variant])
    ids = torch.tensor([ROW, random_tokens(len(ROW), seed=9)])
    mask = torch.ones_like(ids)
    mask[1, :5] = int(extra == "all tokens are there")
    arguments: dict[str, Any] = {
        "attention_mask": {"attention_mask": mask},
        "all tokens are there": {"attention_mask": mask},
        "position_ids": {"position_ids": torch.arange(3, 3 + len(ROW)).expand(2, -1)},
        "document_ids": {
            "document_ids": torch.tensor([IDS, IDS]),
            "position_ids": torch.tensor([POSITIONS, POSITIONS]),
        },
    }[extra]
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    told = {"labels": ids, "use_cache": False, **arguments}
    found, expected = compiled(ids, **told), model(ids, **told)
    kept = mask.bool() if extra == "attention_mask" else torch.ones_like(mask, dtype=torch.bool)
    torch.testing.assert_close(found.logits[kept], expected.logits[kept], atol=1e-5, rtol=1e-5)

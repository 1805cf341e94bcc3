"""What requests do to logits, against a reference written one token at a time."""

import math
import random
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from stellarbyte.ops.cpu import adjustment as compiled
from stellarbyte.sampling.adjustment import LogitAdjustment, RowAdjustment, adjust_logits
from stellarbyte.sampling.logprobs import token_logprobs

VOCABULARY = 70
CPU = torch.device("cpu")
Adjust = Callable[[torch.Tensor, list[RowAdjustment | None]], None]
EITHER = pytest.mark.parametrize(
    "adjust", [pytest.param(adjust_logits, id="torch"), pytest.param(compiled.adjust_logits, id="cpu")]
)


def logits(rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2


def bitmask(allowed: set[int]) -> np.ndarray:
    words = np.zeros(-(-VOCABULARY // 32), np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words


def row(allowed: set[int] | None = None, bans: bool = True, **fields: Any) -> RowAdjustment:
    words = None if allowed is None else bitmask(allowed)
    return LogitAdjustment(VOCABULARY, CPU, **fields).before(array("I"), words, bans=bans)


def random_fields(chance: random.Random) -> dict[str, Any]:
    return {
        "num_prompt": 15,
        "banned": tuple(chance.sample(range(VOCABULARY), 3)) if chance.random() < 0.5 else (),
        "bias": ((chance.randrange(VOCABULARY - 1), 50.0), (VOCABULARY - 1, -100.0)) if chance.random() < 0.5 else (),
        "repetition_penalty": chance.choice([1.0, 1.3, 0.7]),
        "presence_penalty": chance.choice([0.0, 0.5, -1.0]),
        "frequency_penalty": chance.choice([0.0, 0.25, -0.3]),
    }


def reference(x: torch.Tensor, fields: dict[str, Any], tokens: list[int], allowed: set[int] | None) -> list[float]:
    """Mask, ban, bias, then the penalties: repetition, presence, frequency."""
    out = [logit if allowed is None or token in allowed else -math.inf for token, logit in enumerate(x.tolist())]
    banned = [-math.inf if token in fields["banned"] else logit for token, logit in enumerate(out)]
    out = banned if any(map(math.isfinite, banned)) else out
    for token, bias in fields["bias"]:
        out[token] += bias
    answer, repetition = tokens[fields["num_prompt"] :], fields["repetition_penalty"]
    for token in range(len(out)):
        if token in tokens:
            out[token] = out[token] / repetition if out[token] > 0 else out[token] * repetition
        if token in answer:
            out[token] -= fields["presence_penalty"] + fields["frequency_penalty"] * answer.count(token)
    return out


@EITHER
@pytest.mark.parametrize("seed", range(20))
def test_every_adjustment_equals_the_reference_after_any_number_of_tokens(adjust: Adjust, seed: int) -> None:
    """One by one and several at once; then some are taken back, and others follow."""
    chance = random.Random(seed)
    fields = random_fields(chance)
    adjustment = LogitAdjustment(VOCABULARY, CPU, **fields)
    tokens = [chance.randrange(VOCABULARY) for _ in range(chance.choice([8, 15, 40]))]
    for i in range(12):
        allowed = set(chance.sample(range(VOCABULARY), 30)) if chance.random() < 0.5 else None
        now = adjustment.before(array("I", tokens), None if allowed is None else bitmask(allowed), bans=True)
        x = logits()
        expected = reference(x[0], fields, tokens, allowed)
        adjust(x, [now])
        torch.testing.assert_close(x[0].tolist(), expected, rtol=1e-5, atol=1e-5)
        if i == 6:
            tokens = [*tokens[:-3], (tokens[-3] + 1) % VOCABULARY]
        elif i == 9:
            tokens[-1] = (tokens[-1] + 1) % VOCABULARY
        else:
            tokens += [chance.randrange(VOCABULARY) for _ in range(chance.choice([0, 1, 1, 1, 4]))]


class Elements(TorchFunctionMode):
    """Counts the elements of all tensors that operations return."""

    count = 0

    def __torch_function__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = operation(*args, **(kwargs or {}))
        if isinstance(returned, torch.Tensor):
            self.count += returned.numel()
        return returned


@EITHER
@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5}, 20 * VOCABULARY),
        ({"banned": tuple(range(60))}, 20 * VOCABULARY),
        ({"bias": tuple((i, 1.0) for i in range(VOCABULARY))}, 5 * VOCABULARY),
    ],
)
def test_what_a_token_costs_does_not_grow_with_those_before_it(
    adjust: Adjust, fields: dict[str, Any], most: int
) -> None:
    """Counts were made anew from all tokens for each; tensors of biases and bans were, too."""
    costs = []
    for length in (50, 20_000):
        tokens = array("I", [i % VOCABULARY for i in range(length)])
        adjustment = LogitAdjustment(VOCABULARY, CPU, num_prompt=length // 2, **fields)
        adjust(logits(), [adjustment.before(tokens, bans=True)])
        tokens.append(7)
        with Elements() as elements:
            adjust(logits(), [adjustment.before(tokens, bans=True)])
        costs.append(elements.count)
    assert costs[0] == costs[1] <= most


def test_many_rows_are_adjusted_as_each_is_alone_and_those_without_an_adjustment_stay_as_they_are() -> None:
    chance, x = random.Random(0), logits(100)
    rows: list[RowAdjustment | None] = []
    for i in range(len(x)):
        words = bitmask(set(chance.sample(range(VOCABULARY), 9))) if i % 3 else None
        tokens = array("I", [chance.randrange(VOCABULARY) for _ in range(30)])
        adjustment = LogitAdjustment(VOCABULARY, CPU, **random_fields(chance))
        rows.append(None if i % 5 == 4 else adjustment.before(tokens, words, bans=i % 2 == 0))
    together, alone, both = x.clone(), x.clone(), x.clone()
    adjust_logits(together, rows)
    for i, adjustment_of_row in enumerate(rows):
        adjust_logits(alone[i : i + 1], [adjustment_of_row])
    compiled.adjust_logits(both, rows)
    assert torch.equal(together, alone) and torch.equal(together, both)
    assert torch.equal(together[4::5], x[4::5]) and not torch.equal(together, x)


@EITHER
def test_a_ban_gives_way_where_nothing_else_is_allowed_and_ends(adjust: Adjust) -> None:
    """A grammar that allows only the end wins over min_tokens, which bans it."""
    for adjustment, finite in [
        (row(allowed={7}, banned=(7,)), [7]),
        (row(allowed={7, 8}, banned=(7,)), [8]),
        (row(banned=tuple(range(VOCABULARY))), [*range(VOCABULARY)]),
        (row(banned=tuple(range(1, VOCABULARY))), [0]),
        (row(banned=(7,), bans=False), [*range(VOCABULARY)]),
    ]:
        x = logits()
        adjust(x, [adjustment])
        assert x[0].isfinite().nonzero()[:, 0].tolist() == finite


def test_logprobs_are_of_the_raw_logits_and_the_likeliest_come_first() -> None:
    x = logits(3)
    found = token_logprobs(x, [1, 2, 3], [0, 2, 5])
    expected = x.double().log_softmax(dim=-1)
    for row, (token, count) in enumerate(zip([1, 2, 3], [0, 2, 5], strict=True)):
        assert found[row].logprob == pytest.approx(expected[row, token].item(), abs=1e-5)
        ranked = expected[row].argsort(descending=True)[:count].tolist()
        assert [token_id for token_id, _ in found[row].top] == ranked
        assert [value for _, value in found[row].top] == pytest.approx(expected[row, ranked].tolist(), abs=1e-5)


def test_a_rewind_leaves_what_a_new_adjustment_makes_of_the_rest() -> None:
    """Token by token, and several at once; back over a few tokens, over many, and into the prompt."""
    chance = random.Random(0)
    for _ in range(60):
        fields = random_fields(chance)
        kept = LogitAdjustment(VOCABULARY, CPU, **fields)
        tokens = array("I", [chance.randrange(8) for _ in range(15)])
        for _ in range(40):
            for _ in range(chance.choice([1, 1, 2, 5])):
                tokens.append(chance.randrange(8))
                if chance.random() < 0.8:
                    kept.before(tokens)
            if chance.random() < 0.5:
                count = chance.choice([1, 2, 3, 70]) if len(tokens) > 80 else chance.choice([1, 2, 5])
                del tokens[max(5, len(tokens) - count) :]
                kept.rewind(len(tokens))
                tokens.append(chance.randrange(8))
            new = LogitAdjustment(VOCABULARY, CPU, **fields)
            new.before(tokens)
            kept.before(tokens)
            for ours, theirs in ((kept.divisor_V, new.divisor_V), (kept.deduction_V, new.deduction_V)):
                assert (ours is None) == (theirs is None)
                if ours is not None and theirs is not None:
                    torch.testing.assert_close(ours, theirs)
